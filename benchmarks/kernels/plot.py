"""Draw the results of the verify benchmark: microseconds of a step over the batch, one panel per T.

python benchmarks/kernels/plot.py results.csv results.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from arguments import new_file
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
from results import read
from rows import StepRow

MOST_BYTES = 200_000
DPI = (200, 150, 120, 90, 60)  # the first at which the file is small enough
# colour of a contender, and whether its bytes' floor is drawn; what is not named here gets a colour in order
STYLES = {
    "ours S=32 w=0": ("tab:blue", "-", "o"),
    "ours S=32 w=64": ("tab:blue", "--", "o"),
    "ours S=8 w=0": ("tab:green", "-", "s"),
    "ours S=8 w=64": ("tab:green", "--", "s"),
    "flashinfer": ("tab:red", "-", "^"),
    "vllm plain, best": ("0.6", "-", "v"),
    "vllm speculative": ("tab:orange", "-", "D"),
}
LABELS = {
    "ours S=32 w=0": "ours, 32 states",
    "ours S=32 w=64": "ours, 32 states, window 64",
    "ours S=8 w=0": "ours, 8 states",
    "ours S=8 w=64": "ours, 8 states, window 64",
    "flashinfer": "FlashInfer checkpointing_ssu",
    "vllm plain, best": "vLLM, one token",
    "vllm speculative": "vLLM speculative",
}
FLOORS = ("ours S=32 w=0", "ours S=8 w=0")


def draw(rows: list[StepRow]) -> plt.Figure:
    """One panel per number of tokens, both axes logarithmic."""
    timed = [row for row in rows if row.microseconds is not None]
    tokens = sorted({row.tokens for row in timed})
    batches = sorted({row.batch for row in timed})
    columns = min(len(tokens), 2)
    lines = -(-len(tokens) // columns)
    size = (1 + 3.7 * columns, 1.3 + 2.9 * lines)
    figure, panels = plt.subplots(lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    handles = {}
    for axes in panels.flat[len(tokens) :]:
        axes.set_visible(False)
    for axes, T in zip(panels.flat, tokens, strict=False):
        for name, (colour, line, marker) in STYLES.items():
            points = sorted((row for row in timed if (row.tokens, row.contender) == (T, name)), key=lambda r: r.batch)
            if not points:
                continue
            x = [row.batch for row in points]
            handles[LABELS[name]] = axes.plot(
                x, [row.microseconds for row in points],
                color=colour, linestyle=line, marker=marker, markersize=4, linewidth=1.3,
            )[0]  # fmt: skip
            if name in FLOORS:
                floor = [1e6 * row.bytes / row.copy_bandwidth for row in points]
                label = f"floor: bytes at copy bandwidth, {'32' if name == FLOORS[0] else '8'} states"
                handles[label] = axes.plot(x, floor, color=colour, linestyle=":", linewidth=1)[0]
        axes.set(xscale="log", yscale="log", title=f"T = {T}")
        axes.xaxis.set_major_locator(FixedLocator(batches))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(True, which="major", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
    for axes in panels[-1]:
        axes.set_xlabel("sequences in the batch")
    figure.supylabel("microseconds per layer and step", fontsize=10)
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=3, fontsize=8, frameon=False)
    gpu, bandwidth = timed[0].gpu, timed[0].copy_bandwidth / 1e12
    figure.suptitle(f"{gpu}, copy {bandwidth:.2f} TB/s: one step of T tokens per sequence", fontsize=10)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    return figure


def save(figure: plt.Figure, out: Path) -> None:
    """Write a PNG of at most MOST_BYTES, as fine as that allows.

    Raises:
        ValueError: even the coarsest is larger.
    """
    part = out.with_name(out.name + ".part")
    for dpi in DPI:
        figure.savefig(part, dpi=dpi, format="png")
        if part.stat().st_size <= MOST_BYTES:
            part.replace(out)
            return
    part.unlink()
    raise ValueError(f"{out} would be larger than {MOST_BYTES} bytes even at {DPI[-1]} dots per inch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="CSV of verify.py")
    parser.add_argument("out", type=new_file, help="PNG to write")
    args = parser.parse_args()
    try:
        rows = read(args.results, StepRow)
        if not any(row.microseconds is not None for row in rows):
            raise ValueError(f"{args.results} holds no times")
        save(draw(rows), args.out)
    except (OSError, ValueError) as problem:
        sys.exit(f"plot.py: {problem}")


if __name__ == "__main__":
    main()
