"""Slots copied between blocks for prefix caching."""

from __future__ import annotations

import subprocess
import sys

from .conftest import HERE


def test_copies_by_kernel_and_by_loop(environment):
    """In a process of its own, in which vLLM takes Triton's interpreter for a backend."""
    paths = f"{HERE / 'interpreted_triton'}:{HERE.parents[1]}:{environment['PYTHONPATH']}"
    done = subprocess.run(
        [sys.executable, str(HERE / "copy_run.py")],
        env=environment | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "copies are right" in done.stdout
