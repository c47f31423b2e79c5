"""Curves and a summary of training runs, from the metrics.jsonl that their recipes log: `mamba-hybrid report`."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from .errors import UserError
from .output import write_output
from .text import read_file

Row = dict[str, float]

# panels in their order: (title, its metrics, a logarithmic axis); a metric that a run has not is left out
PANELS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("loss", ("loss",), False),
    ("KL(teacher || student), nats per token", ("kl",), False),
    ("cross-entropy, nats per token", ("ce",), False),
    ("top-1 agreement with the teacher", ("agreement",), False),
    ("gradient norm", ("grad_norm",), True),
    ("gradient norms of the parts", ("grad_norm_*",), True),
    ("relative error of the residual stream", ("residual_error_*",), False),
    ("losses of the layers", ("loss_layer_*",), True),
    ("KL with a layer's attention", ("kl_layer_*",), False),
    ("gates", ("gate_layer_*",), False),
    ("learning rates", ("lr_*",), False),
    ("tokens/s", ("tokens_per_s",), False),
    ("share of the devices' peak (MFU)", ("mfu",), False),
    ("peak memory, GiB", ("peak_memory_gib",), False),
)
APART = ("step", "tokens", "pairs", "epoch", "seconds", "tflops")  # what no curve is drawn of
SUMMARY = (
    "loss", "kl", "ce", "agreement", "accuracy", "reward_margin", "grad_norm", "tokens_per_s", "mfu", "peak_memory_gib",
)  # fmt: skip
HIGH_IS_BEST = ("agreement", "accuracy", "reward_margin", "tokens_per_s", "mfu")
# what a recipe counts, and in what unit; the first that all runs have is the axis below the curves
COUNTS = (("tokens", "labelled tokens, millions", 1e6), ("pairs", "pairs, thousands", 1e3), ("step", "steps", 1))
SMOOTH = 10  # steps of the running mean


@dataclass(frozen=True)
class Run:
    """A run's metrics.

    Args:
        name: as it was given.
        rows: one a logged step, in order.
    """

    name: str
    rows: list[Row]

    def seen(self, count: str) -> list[float]:
        """How many of something ("tokens", "pairs", "step") there were until each row."""
        if count == "step":
            return [row["step"] for row in self.rows]
        return list(accumulate(row.get(count, 0) for row in self.rows))

    @property
    def hours(self) -> float:
        """Of training; reading models and writing checkpoints are not in it."""
        return sum(row["seconds"] for row in self.rows if "seconds" in row) / 3600

    def series(self, key: str, count: str) -> tuple[list[float], list[float]]:
        """(what `seen` gives, values) of the rows that have a metric."""
        pairs = [(x, row[key]) for x, row in zip(self.seen(count), self.rows, strict=True) if key in row]
        return [x for x, _ in pairs], [y for _, y in pairs]

    def keys(self, pattern: str) -> list[str]:
        """Metrics of a name, or of names that begin as one with * at its end does."""
        found = dict.fromkeys(key for row in self.rows for key in row)
        if not pattern.endswith("*"):
            return [pattern] if pattern in found else []
        return [key for key in found if key.startswith(pattern[:-1])]


def read_run(path: str | Path) -> Run:
    """Metrics of a run.

    Args:
        path: its output_dir, or the .jsonl file.

    Raises:
        UserError: there are none, or a line is none.
    """
    file = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"{path} has no metrics.jsonl; give a run's output_dir, or its JSONLLogger's file")
    rows: list[Row] = []
    lines = read_file(file).splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({str(key): float(value) for key, value in row.items()} | {"step": int(row["step"])})
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            if number == len(lines) and rows:  # a run that is writing it
                break
            raise UserError(f"{file}, line {number} is no row of metrics: {line:.60}") from e
    if not rows:
        raise UserError(f"{file} has no rows yet; it is written every log_every steps")
    return Run(str(path), rows)


def summary(runs: Sequence[Run]) -> str:
    """Table of the runs: steps, tokens, and of each metric the first, the last and the best value."""
    lines = []
    width = max(len(name) for name in (*SUMMARY, "metric"))
    for run in runs:
        first, last = int(run.rows[0]["step"]), int(run.rows[-1]["step"])
        lines.append(f"{run.name}: steps {first} to {last}{_counted(run)}{_hours(run)}")
        lines.append(f"  {'metric':{width}}  {'first':>11}  {'last':>11}  {'best':>11}  at step")
        for key in SUMMARY:
            pairs = [(row[key], int(row["step"])) for row in run.rows if key in row and math.isfinite(row[key])]
            if pairs:
                best, step = (max if key in HIGH_IS_BEST else min)(pairs, key=lambda pair: pair[0])
                figures = "  ".join(f"{v:>11.5g}" for v in (pairs[0][0], pairs[-1][0], best))
                lines.append(f"  {key:{width}}  {figures}  {step}")
    return "\n".join(lines)


def _counted(run: Run) -> str:
    if run.keys("pairs"):
        return f", {run.seen('pairs')[-1]:.0f} pairs"
    return f", {run.seen('tokens')[-1] / 1e6:.3f} M labelled tokens" if run.keys("tokens") else ""


def _hours(run: Run) -> str:
    return f", {run.hours:.2f} hours" if run.hours else ""


def draw(runs: Sequence[Run], out: str | Path) -> None:
    """Write the curves of all runs over what they were trained on (`COUNTS`), into one .png, .svg, .pdf or .html.

    Args:
        runs: to lay over each other.
        out: the file; an .html has the picture and the table in it.

    Raises:
        UserError: matplotlib is not there, the file's kind is unknown, it cannot be written, or no run has a metric.
    """
    out = Path(out)
    if out.suffix not in (".png", ".svg", ".pdf", ".html"):
        raise UserError(f"--out {out} must end in .png, .svg, .pdf or .html")
    figure = _figure(runs)
    picture = io.BytesIO()
    figure.savefig(picture, format="png" if out.suffix == ".html" else out.suffix[1:], dpi=120)
    data = picture.getvalue()
    if out.suffix == ".html":
        image = base64.b64encode(data).decode()
        names = html.escape(", ".join(run.name for run in runs))
        data = (
            f"<!doctype html>\n<meta charset='utf-8'>\n<title>{names}</title>\n"
            f"<pre>{html.escape(summary(runs))}</pre>\n"
            f"<img alt='curves' src='data:image/png;base64,{image}'>\n"
        ).encode()
    write_output("--out", out, data)


def _figure(runs: Sequence[Run]) -> Any:
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, nothing global
    except ImportError as e:
        raise UserError("curves need matplotlib: pip install 'mamba-hybrid[report]'") from e
    shown = [panel for panel in PANELS if any(run.keys(pattern) for run in runs for pattern in panel[1])]
    drawn = {key for run in runs for _, patterns, _ in shown for pattern in patterns for key in run.keys(pattern)}
    others = dict.fromkeys(key for run in runs for row in run.rows for key in row if key not in (*drawn, *APART))
    shown += [(key, (key,), False) for key in others]  # of recipes that log something of their own
    if not shown:
        raise UserError(f"{', '.join(run.name for run in runs)}: no metric to draw")
    count, unit, scale = next(c for c in COUNTS if all(run.keys(c[0]) for run in runs))
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    width, height = 5.2 * columns, 3.2 * lines
    figure = Figure(figsize=(width, height))
    # room in inches: matplotlib's own layouts draw everything several times to find it
    figure.subplots_adjust(0.6 / width, 0.5 / height, 1 - 0.2 / width, 1 - 0.4 / height, wspace=0.18, hspace=0.38)
    for at, (title, patterns, logarithmic) in enumerate(shown, 1):
        axes = figure.add_subplot(lines, columns, at)
        first = next(i for i, run in enumerate(runs) if any(run.keys(pattern) for pattern in patterns))
        for number, run in enumerate(runs):
            keys = [key for pattern in patterns for key in run.keys(pattern)]
            for i, key in enumerate(keys):
                seen, y = run.series(key, count)
                x = [n / scale for n in seen]
                color = f"C{number if len(keys) == 1 else i % 10}"
                name = run.name if len(keys) == 1 else key.removeprefix(patterns[0][:-1])
                axes.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
                style = "-" if len(keys) == 1 or number == first else ("--", ":", "-.")[(number - 1) % 3]
                axes.plot(x, _mean(y), style, color=color, label=name if len(keys) == 1 or number == first else None)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(unit, fontsize=8)
        if logarithmic:
            axes.set_yscale("log")
        if len(runs) > 1 or "*" in patterns[0]:
            axes.legend(fontsize=6)
    return figure


def _mean(values: list[float]) -> list[float]:
    """Running mean over the last `SMOOTH` values."""
    parts = (values[max(0, i - SMOOTH + 1) : i + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in parts]
