"""`readout.readout` in Triton: a program takes some heads of one token through norm, weights and gate.

Shapes: M tokens, H query heads, P head width; formulas in `readout.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize_on_alignment=["live_ptr"])
def _readout(
    near_ptr, far_ptr, z_ptr, near_weight_ptr, far_weight_ptr, live_ptr, out_ptr,
    near_stride, far_stride, z_stride, eps,
    H: tl.constexpr, P: tl.constexpr, GATE: tl.constexpr, AFTER: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    h_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    p_P = tl.arange(0, BLOCK_P)
    in_HP = (h_H < H)[:, None] & (p_P < P)[None, :]
    at_HP = h_H[:, None] * P + p_P[None, :]
    if live_ptr is not None and m >= tl.load(live_ptr):
        tl.store(out_ptr + m * (H * P) + at_HP, tl.zeros((BLOCK_H, BLOCK_P), out_ptr.dtype.element_ty), mask=in_HP)
        return
    far_HP = tl.load(far_ptr + m * far_stride + at_HP, mask=in_HP, other=0).to(tl.float32)
    gate_HP = tl.full((BLOCK_H, BLOCK_P), 1.0, tl.float32)
    if z_ptr is not None:
        z_HP = tl.load(z_ptr + m * z_stride + at_HP, mask=in_HP, other=0).to(tl.float32)
        gate_HP = tl.sigmoid(z_HP)
        gate_HP = gate_HP * z_HP if GATE == "silu" else gate_HP * 2
    if AFTER:
        far_HP = far_HP * gate_HP
    far_HP = far_HP * tl.rsqrt(tl.sum(far_HP * far_HP, 1) / P + eps)[:, None]
    out_HP = far_HP * tl.load(far_weight_ptr + at_HP, mask=in_HP, other=0)
    if near_ptr is not None:
        near_HP = tl.load(near_ptr + m * near_stride + at_HP, mask=in_HP, other=0).to(tl.float32)
        out_HP += near_HP * tl.load(near_weight_ptr + at_HP, mask=in_HP, other=0)
    if not AFTER:
        out_HP = out_HP * gate_HP
    tl.store(out_ptr + m * (H * P) + at_HP, out_HP, mask=in_HP)


def launch(near, far, z, near_weight_HP, far_weight_HP, live, out, gate: str, norm: str, eps: float) -> Tensor:
    """Args and result as `readout.readout`; heads of a token must lie side by side."""
    H, P = far.shape[-2:]
    near = None if near is None or norm == "after_gate" else near.reshape(-1, H * P)
    far_MX = far.reshape(-1, H * P)
    z_MX = None if z is None else z.reshape(-1, H * P)
    if out is None:
        out = torch.empty(far_MX.shape, dtype=torch.float32 if z is None else z.dtype, device=far.device)
    block_p = triton.next_power_of_2(P)
    block_h = min(max(1024 // block_p, 1), triton.next_power_of_2(H))
    if len(out):
        _readout[(len(out), triton.cdiv(H, block_h))](
            near, far_MX, z_MX, near_weight_HP, far_weight_HP, live, out,
            0 if near is None else near.stride(0), far_MX.stride(0), 0 if z_MX is None else z_MX.stride(0), eps,
            H=H, P=P, GATE=gate, AFTER=norm == "after_gate", BLOCK_H=block_h, BLOCK_P=block_p, num_warps=4,
        )  # fmt: skip
    return out.view(*far.shape[:-2], H * P)
