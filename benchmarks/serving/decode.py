"""Time decoding in vLLM at the shapes of an 8B (dummy weights): Llama, vLLM's Mamba-2 mixer, ours, with and without
speculation, one engine after another.

    python benchmarks/serving/decode.py --out decode.csv [--systems groups,groups-4,stock] [--batches 1,32,256]
                                        [--context 2048] [--seconds 2] [--memory 0.9] [--warm]

A system is a kind of model (llama, stock, heads, groups: see shapes.py), with "-K" after it a two-layer draft model of
the same kind that drafts K tokens. A dummy model agrees with no one, so each draft is accepted with probability
--acceptance by vLLM's synthetic rejection, whatever the tokens; target and drafter compute all they would. (Adaptive
verification judges drafts by the draft model's logits, so that dummy ones cannot show what it brings.)

The rate is tokens of all sequences over a stretch of --seconds that begins when the last prompt has been read. Where
not all sequences fit into the memory, "running" says how many did. --warm only starts the engines, several at once, so
that what torch.compile and Triton make is on disk for the timed start.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from engines import environment, plugin, printed_rows, save
from shapes import write

KINDS = ("llama", "stock", "heads", "groups")
SYSTEMS = (*KINDS, "stock-4", "heads-4", "groups-4", "heads-8", "groups-8")
COLUMNS = ("system", "batch", "running", "context", "tokens_per_second", "status", "blocks", "gpu")
SETTLE = 8  # steps after the last prompt before the clock starts
FULL = 40  # steps in which no sequence starts, after which the rest is taken not to fit


def arguments_of(system: str, folder: Path, args: argparse.Namespace) -> dict:
    """vLLM's arguments for a system."""
    kind, _, drafts = system.partition("-")
    room = args.context + args.room
    engine = {
        "model": str(write(folder, kind, "target", args.tiny)), "load_format": "dummy", "skip_tokenizer_init": True,
        "max_model_len": room, "max_num_seqs": max(args.batches), "enable_prefix_caching": False,
        "max_num_batched_tokens": 256 if args.tiny else 8192, "gpu_memory_utilization": args.memory,
        "mamba_ssm_cache_dtype": "float32", "disable_log_stats": True, "enforce_eager": args.tiny,
    }  # fmt: skip
    if drafts:
        K = int(drafts)
        # vLLM's Mamba-2 mixer cannot draft: its two-layer drafter is a Llama
        draft = write(folder, "llama" if kind == "stock" else kind, "draft", args.tiny)
        engine["speculative_config"] = {
            "method": "draft_model", "model": str(draft), "num_speculative_tokens": K,
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_rates": [args.acceptance ** (i + 1) for i in range(K)],
        }  # fmt: skip
    return engine


def rate(engine, batch: int, args: argparse.Namespace) -> tuple[int, float]:
    """How many of so many sequences run at once, and their tokens a second."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    rng, vocabulary = random.Random(0), 500
    sampling = SamplingParams(
        temperature=0, max_tokens=args.room - 1, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )
    names = [f"{batch}-{i}" for i in range(batch)]
    for name in names:
        prompt = [rng.randrange(3, vocabulary) for _ in range(args.context)]
        engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), sampling)
    started: set[str] = set()
    waited = 0
    while len(started) < batch and (not started or waited < FULL):
        new = {out.request_id for out in engine.step() if out.outputs[0].token_ids} - started
        waited = 0 if new else waited + 1
        started |= new
    for _ in range(SETTLE):
        engine.step()
    tokens, began = 0, time.perf_counter()
    while (took := time.perf_counter() - began) < args.seconds:
        for out in engine.step():
            if out.finished:
                raise RuntimeError(f"a sequence ended after {args.room} tokens; raise --room")
            tokens += len(out.outputs[0].token_ids)
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    return len(started), tokens / took


def measure(system: str, args: argparse.Namespace) -> None:
    """Start one engine in this process and print a JSON line for each batch."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    with tempfile.TemporaryDirectory() as folder:
        engine = LLMEngine.from_engine_args(EngineArgs(**arguments_of(system, Path(folder), args)))
        cache = engine.vllm_config.cache_config
        for batch in () if args.warm else args.batches:
            running, tokens = rate(engine, batch, args)
            row = {"system": system, "batch": batch, "running": running, "context": args.context}
            row["tokens_per_second"] = round(tokens, 1)
            row |= {"status": "ok", "blocks": cache.num_gpu_blocks, "gpu": current_platform.get_device_name()}
            print(json.dumps(row), flush=True)


def run(system: str, argv: list[str], known: Path) -> subprocess.Popen:
    """A process for a system."""
    command = [sys.executable, __file__, "--one", system, *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(known))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="CSV to write")
    parser.add_argument("--systems", type=lambda text: text.split(","), default=list(SYSTEMS))
    parser.add_argument(
        "--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32, 64, 128, 256]
    )
    parser.add_argument("--context", type=int, default=2048, help="tokens of a prompt")
    parser.add_argument("--room", type=int, default=2048, help="tokens that a sequence may get")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--acceptance", type=float, default=0.75)
    parser.add_argument("--memory", type=float, default=0.9, help="share of the GPU's memory")
    parser.add_argument("--warm", action="store_true", help="only start each engine")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, eager: a trial")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure(args.one, args)
        return 0
    unknown = [s for s in args.systems if s.partition("-")[0] not in KINDS]
    if unknown:
        parser.error(f"unknown systems {unknown}; kinds are {KINDS}")
    with tempfile.TemporaryDirectory() as folder:
        return compare(args, plugin(Path(folder)))


def compare(args: argparse.Namespace, known: Path) -> int:
    """All systems, one after another; the exit status."""
    argv = sys.argv[1:]
    if args.warm:
        processes = [run(system, argv, known) for system in args.systems]
        return max(process.wait() for process in processes)
    rows: list[dict] = []
    for system in args.systems:
        began = time.perf_counter()
        process = run(system, argv, known)
        rows += printed_rows(process)
        code = process.wait()
        print(f"{system}: exit {code} after {time.perf_counter() - began:.0f} s", flush=True)
        if code:
            rows.append({"system": system, "status": f"exit {code}"})
    if args.out:
        save(args.out, COLUMNS, rows)
    return 0 if all(row["status"] == "ok" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
