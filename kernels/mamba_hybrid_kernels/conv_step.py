"""The short convolution of a ragged step in one launch: `conv.short_conv_step` with its rows on the device.

Shapes: M tokens of the step, R rows (sequences), T tokens of a row, C channels, K width of the convolution, W rows of
the convolution's ring.

    out_t = bias + sum_k weight[:, k] raw_{t - (K - 1 - k)}

Inputs below a row's first token come from its slot's ring by position modulo W, zeros before position 0. A program owns
(row, block of channels) and walks through the row's tokens; it reads the ring first and writes the newest W inputs
into it last, so no program meets another's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .slot import SlotLayout, SlotTensors


@triton.jit
def _conv_step(
    raw_ptr, raw_stride, weight_ptr, bias_ptr, ring_ptr, ring_stride, slot_ptr, start_ptr, first_ptr, out_ptr,
    C: tl.constexpr, K: tl.constexpr, W: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    c_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_C = c_C < C
    slot = tl.load(slot_ptr + row).to(tl.int64)
    m0 = tl.load(first_ptr + row).to(tl.int64)
    T = (tl.load(first_ptr + row + 1) - m0).to(tl.int32)
    start = tl.load(start_ptr + row).to(tl.int32)
    if (slot < 0) | (T <= 0):
        return
    raw_ptr += m0 * raw_stride
    ring_ptr += slot * ring_stride
    bias_C = tl.load(bias_ptr + c_C, mask=in_C, other=0).to(tl.float32)
    t_T = tl.arange(0, BLOCK_T)
    for t0 in range(0, T, BLOCK_T):
        out_TC = tl.zeros((BLOCK_T, BLOCK_C), tl.float32) + bias_C[None, :]
        for k in tl.static_range(K):
            i_T = t0 + t_T - (K - 1 - k)  # counted from the row's first token
            at_T = start + i_T
            weight_C = tl.load(weight_ptr + c_C * K + k, mask=in_C, other=0).to(tl.float32)
            new_TC = (i_T >= 0)[:, None] & (i_T < T)[:, None] & in_C[None, :]
            old_TC = (i_T < 0)[:, None] & (at_T >= 0)[:, None] & in_C[None, :]
            raw_TC = tl.load(raw_ptr + i_T.to(tl.int64)[:, None] * raw_stride + c_C[None, :], mask=new_TC, other=0)
            past_TC = tl.load(ring_ptr + (at_T % W)[:, None] * C + c_C[None, :], mask=old_TC, other=0)
            out_TC += weight_C[None, :] * (raw_TC.to(tl.float32) + past_TC.to(tl.float32))
        live_TC = (t0 + t_T < T)[:, None] & in_C[None, :]
        tl.store(out_ptr + (m0 + t0 + t_T)[:, None] * C + c_C[None, :], out_TC, mask=live_TC)
    tl.debug_barrier()  # a thread may write what another one has read above
    w_W = tl.maximum(T - W, 0) + tl.arange(0, BLOCK_W)
    kept_WC = (w_W < T)[:, None] & in_C[None, :]
    raw_WC = tl.load(raw_ptr + w_W.to(tl.int64)[:, None] * raw_stride + c_C[None, :], mask=kept_WC)
    tl.store(ring_ptr + ((start + w_W) % W)[:, None] * C + c_C[None, :], raw_WC, mask=kept_WC)


def conv_step(
    slots: SlotTensors,
    layout: SlotLayout,
    slot_R: Tensor,
    start_R: Tensor,
    first_R1: Tensor,
    raw_MC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor,
) -> Tensor:
    """The convolution of a step, which updates the slots' rings; rows as in `verify.verify`.

    Nothing is read on the host, so a CUDA graph can hold it. Rows without tokens or with a negative slot are left
    alone, their outputs unwritten.

    Args:
        slots, layout: the layer's slots; the layout has a convolution.
        slot_R, start_R, first_R1: int32 or int64, slot, position of the first token and where the tokens begin.
        raw_MC: inputs, the last dimension contiguous.
        weight_CK, bias_C: of the convolution.

    Returns:
        (M, C) in the inputs' dtype.
    """
    assert slots.conv is not None, "the layout has no short convolution"
    C, K = weight_CK.shape
    raw_MC = raw_MC if raw_MC.stride(-1) == 1 else raw_MC.contiguous()
    out = torch.empty(raw_MC.shape, dtype=raw_MC.dtype, device=raw_MC.device)
    block_c = min(128, triton.next_power_of_2(C))
    _conv_step[(slot_R.shape[0], triton.cdiv(C, block_c))](
        raw_MC, raw_MC.stride(0), weight_CK.contiguous(), bias_C.contiguous(), slots.conv, slots.conv.stride(0),
        slot_R, start_R, first_R1, out,
        C=C, K=K, W=layout.conv_ring, BLOCK_T=16, BLOCK_C=block_c, BLOCK_W=triton.next_power_of_2(layout.conv_ring),
        num_warps=4,
    )  # fmt: skip
    return out
