"""Launch configurations of the Triton kernels: a committed table for GPUs that were tuned, defaults elsewhere.

A table is a JSON file named after the GPU, made by `benchmarks/kernels/tune.py`. It maps a case of the verify kernel to
launches for more and more programs' worth of work, [most states of a batch, {...}], the last one without a limit.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from torch import Tensor

TABLES = Path(__file__).with_name("launches")


def precision(t: Tensor) -> str:
    """Triton's input_precision of products with fp32 operands for activations like t.

    fp32 activations keep fp32's accuracy; with 16-bit ones the fp32 operand (a state, a weight) may round to tf32.
    """
    if not t.is_cuda or torch.version.hip:
        return "ieee"
    return "tf32x3" if t.dtype == torch.float32 else "tf32"


def case_of(queries: int, state: tuple[int, int], window: int, far: int) -> str:
    """The table's name of a case.

    Args:
        queries: (head, token) pairs that read one state in a step.
        state: P and N.
        window: tokens of attention.
        far: most rows beyond the window.
    """
    return f"P{state[0]} N{state[1]} queries {queries} window {window} far {far}"


def table_path(gpu: str) -> Path:
    """Where the table of a GPU of that name stands."""
    return TABLES / f"{gpu.replace(' ', '_').replace('/', '_')}.json"


@functools.cache
def _table(gpu: str) -> dict[str, list[list]]:
    path = table_path(gpu)
    return json.loads(path.read_text()) if path.is_file() else {}


@functools.cache
def _gpu(index: int) -> str:
    return torch.cuda.get_device_name(index)


def tuned(device: torch.device, case: str, states: int) -> dict | None:
    """The launch of a case on a device for a batch of so many states, None where nobody has tuned it."""
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    rows = _table(_gpu(index)).get(case, [])
    return next((launch for most, launch in rows if most is None or states <= most), None)
