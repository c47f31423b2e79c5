"""Engines in processes of their own, what they print, and the table that it becomes."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from mamba_hybrid.output import write_output

# of several GPUs: no all-reduce over NVLink multicast, which is not everyone's on a host that is shared
NO_MULTICAST = {"VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "VLLM_ALLREDUCE_USE_FLASHINFER": "0"}


def parallel(gpus: int) -> dict:
    """vLLM's arguments for so many GPUs; see NO_MULTICAST."""
    if gpus == 1:
        return {}
    return {"tensor_parallel_size": gpus, "compilation_config": {"pass_config": {"fuse_allreduce_rms": False}}}


def plugin(folder: Path) -> Path:
    """A directory that makes each of vLLM's processes know the stock model, if it is on their path."""
    info = folder / "stock_hybrid-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stock-hybrid\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nstock_hybrid = stock:register\n")
    return folder


def environment(known: Path, **more: str) -> dict[str, str]:
    """For a process that finds the scripts of this folder and the plugin in `known`."""
    paths = [str(Path(__file__).parent), str(known), os.environ.get("PYTHONPATH", "")]
    return NO_MULTICAST | os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | more


def printed_rows(process: subprocess.Popen) -> Iterator[dict]:
    """The JSON lines that a process prints, shown as they come, until it closes its output."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            print(line.strip(), flush=True)
            yield json.loads(line)


def load(file: Path | None) -> list[dict]:
    """Rows of a CSV that `save` wrote, none where there is no such file; all values are text."""
    if file is None or not file.is_file():
        return []
    with file.open(newline="") as f:
        return list(csv.DictReader(f))


def save(file: Path, columns: Sequence[str], rows: list[dict]) -> None:
    """Write a CSV; columns that rows have beside those stay."""
    names = dict.fromkeys([*columns, *(name for row in rows for name in row)])
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(names))
    writer.writeheader()
    writer.writerows(rows)
    write_output("--out", file, table.getvalue().encode())
