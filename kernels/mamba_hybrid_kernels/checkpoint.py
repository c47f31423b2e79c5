"""The checkpoint position of a slot as a kernel takes it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def checkpoint(held, start, W: tl.constexpr, WINDOW: tl.constexpr, STEP: tl.constexpr):
    """c of a row that begins at `start` and whose slot holds `held`; `SlotLayout.checkpoint` on the host."""
    return tl.maximum(tl.minimum(tl.maximum(held, start + STEP - W), start - WINDOW), 0)
