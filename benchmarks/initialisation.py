"""Step-0 KL of ways to start a hybrid, none of them trained: one row a way, in Markdown.

    python benchmarks/initialisation.py SRC --calibrate TEXT --text TEXT [--device cuda] [--rows NAME ...]

SRC is a plain Transformer (directory or GGUF); --text is scored and should not be what was calibrated on.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from mamba_hybrid.compare import compare
from mamba_hybrid.convert import Conversion, attention_layers, convert
from mamba_hybrid.source import open_source


def rows(groups: int) -> dict[str, dict]:
    """Name of a row -> what it changes in a Conversion."""
    most = 22 / 30
    return {
        "the paper's code: copied projections, the rest random": dict(init="original"),
        "window 64, states per query head": dict(),
        "window 64, states per KV head": dict(mixer={"state_heads": groups}),
        "window 64, states per query head, 73 % attention kept": dict(keep=most),
        "window 64, states per KV head, 73 % attention kept": dict(keep=most, mixer={"state_heads": groups}),
        "window 0, states per query head": dict(mixer={"window": 0}),
        "window 0, states per KV head": dict(mixer={"window": 0, "state_heads": groups}),
        "window 64, on the student's inputs": dict(inputs="student"),
        "window 0, on the student's inputs": dict(inputs="student", mixer={"window": 0}),
        "window 64, ridge 0.03": dict(ridge=0.03),
        "window 64, ridge 0.3": dict(ridge=0.3),
        "window 0, ridge 0.03": dict(ridge=0.03, mixer={"window": 0}),
        "window 0, ridge 0.3": dict(ridge=0.3, mixer={"window": 0}),
        "window 64, 65,536 tokens": dict(tokens=65_536),
        "window 0, 65,536 tokens": dict(tokens=65_536, mixer={"window": 0}),
        "window 16, states per query head": dict(mixer={"window": 16}),
        "window 128, states per query head": dict(mixer={"window": 128}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--calibrate", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=20_000, help="of --text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", nargs="*", help="only rows whose name contains one of these")
    args = parser.parse_args()
    config = open_source(args.source).config
    print("| start | attention layers | KL nats/token | top-1 agreement | perplexity ratio | seconds |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as work:
        for name, change in rows(config.num_key_value_heads).items():
            if args.rows and not any(part in name for part in args.rows):
                continue
            out = str(Path(work) / "hybrid")
            began = time.perf_counter()
            convert(
                Conversion(
                    source=args.source,
                    out=out,
                    calibrate=args.calibrate if change.get("init") != "original" else None,
                    dtype="float32",
                    overwrite=True,
                    device=args.device,
                    **change,
                )
            )
            took = time.perf_counter() - began
            d = compare(args.source, [out], args.text, tokens=args.tokens, device=args.device)[out]
            kept = len(attention_layers(config.num_hidden_layers, change.get("keep", 0.5)))
            print(
                f"| {name} | {kept} of {config.num_hidden_layers} | {d.kl:.3f} | {d.agreement:.2f} "
                f"| {d.perplexity_ratio:.2f} | {took:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
