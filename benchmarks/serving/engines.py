"""Engines in processes of their own, what they print, and the table that it becomes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path


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
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | more


def printed_rows(process: subprocess.Popen) -> list[dict]:
    """The JSON lines that a process prints, shown as they come, until it closes its output."""
    rows = []
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            rows.append(json.loads(line))
            print(line.strip(), flush=True)
    return rows


def save(file: Path, columns: Sequence[str], rows: list[dict]) -> None:
    """Write a CSV."""
    with file.open("w", newline="") as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows(rows)
