"""Depthwise causal short convolution over x, B and C, whole sequences and steps.

Shapes: B batch, L length, M tokens of a step, C channels, K width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import StepRows
from .slot import SlotLayout, SlotTensors
from .ssd import delay


def short_conv(raw_BLC: Tensor, weight_CK: Tensor, bias_C: Tensor, *, doc_BL: Tensor | None = None) -> Tensor:
    """out_t = bias + sum_k weight[:, k] raw_{t - (K - 1 - k)}, zeros before the start of a document.

    Args:
        raw_BLC: inputs (B, L, C), any float dtype.
        weight_CK: (C, K); the identity is 1 in the last column, 0 elsewhere.
        bias_C: (C,).
        doc_BL: integer document ids (B, L).

    Returns:
        (B, L, C) in the inputs' dtype.
    """
    taps = weight_CK.shape[1]
    out = bias_C.expand_as(raw_BLC)
    for k in range(taps):
        out = out + weight_CK[:, k] * delay(raw_BLC, taps - 1 - k, doc_BL)
    return out.to(raw_BLC.dtype)


def short_conv_step(
    slots: SlotTensors,
    layout: SlotLayout,
    rows: StepRows,
    raw_MC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """`short_conv` of a ragged step; the inputs before it come from the slots' ring, which takes up the new ones.

    Args and the order of tokens as in `replay.replay`.

    Raises:
        ValueError: an unknown backend.
    """
    assert slots.conv is not None, "the layout has no short convolution"
    backend = backend or ("triton" if raw_MC.is_cuda else "reference")
    if backend == "triton":
        from .conv_step import conv_step  # Triton is needed to run, not to import

        return conv_step(slots, layout, rows.slot_R, rows.start_R, rows.first_R1, raw_MC, weight_CK, bias_C)
    if backend != "reference":
        raise ValueError(f"backend {backend!r} is none of 'reference', 'triton'")
    reach, ring = layout.conv - 1, layout.conv_ring
    out = torch.zeros_like(raw_MC)
    for slot, p, at, T in rows.on_host():
        new = raw_MC[at : at + T]
        past = torch.arange(p - reach, p, device=new.device)
        before = torch.where((past >= 0)[:, None], slots.conv[slot, past % ring], 0)
        out[at : at + T] = short_conv(torch.cat([before, new])[None], weight_CK, bias_C)[0, reach:]
        kept = torch.arange(max(p, p + T - ring), p + T, device=new.device)
        slots.conv[slot, kept % ring] = new[kept - p]
    return out
