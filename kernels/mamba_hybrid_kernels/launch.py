"""Launch configurations of the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def precision(t: Tensor) -> str:
    """Triton's input_precision of products with fp32 operands for activations like t.

    fp32 activations keep fp32's accuracy; with 16-bit ones the fp32 operand (a state, a weight) may round to tf32.
    """
    if not t.is_cuda or torch.version.hip:
        return "ieee"
    return "tf32x3" if t.dtype == torch.float32 else "tf32"


def launch_of(kind, device, layout, rows, tokens):
    return kind()
