"""`forward_kl.forward_kl` in Triton: a program takes one token through its vocabulary twice, first for maxima and sums,
then for the KL and the gradient.

Shapes: K tokens, V vocabulary; in the kernel also B logits of a block. Each of the B lanes keeps the maximum and the
sum of its own logits, and they meet once, at the end. Logits are in units of log 2, powers are of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .forward_kl import IGNORED

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
BLOCK, WARPS = 2048, 8


@triton.jit
def _more(x_B, v_B, most_B, sum_B, at_B, scale):
    """Maximum, its place, and the sum of 2^((x - maximum) scale) after another block."""
    over_B = tl.maximum(most_B, x_B)
    sum_B = sum_B * tl.exp2((most_B - over_B) * scale) + tl.exp2((x_B - over_B) * scale)
    return over_B, sum_B, tl.where(x_B > most_B, v_B, at_B)


@triton.jit
def _first_best(most_B, at_B, most, V):
    """The smallest place of the maximum."""
    return tl.min(tl.where(most_B == most, at_B, V), 0)


@triton.jit
def _forward_kl(
    s_ptr, t_ptr, label_ptr, kl_ptr, ce_ptr, agree_ptr, slope_ptr, s_stride, t_stride, slope_stride,
    a, b, tau, V, IGNORED: tl.constexpr, TEMPERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0).to(tl.int64)
    label = tl.load(label_ptr + k)
    s_ptr += k * s_stride
    t_ptr += k * t_stride
    b_B = tl.arange(0, BLOCK)
    if label == IGNORED:
        tl.store(kl_ptr + k, 0.0)
        tl.store(ce_ptr + k, 0.0)
        tl.store(agree_ptr + k, 0)
        if slope_ptr is not None:
            zeros_B = tl.zeros((BLOCK,), slope_ptr.dtype.element_ty)
            for v0 in range(0, V, BLOCK):
                tl.store(slope_ptr + k * slope_stride + v0 + b_B, zeros_B, mask=v0 + b_B < V)
        return

    scale = LOG2_E / tau
    most_s_B = tl.full((BLOCK,), -1e30, tl.float32)  # finite: a lane may have no logit
    most_t_B = tl.full((BLOCK,), -1e30, tl.float32)
    sum_r_B = tl.zeros((BLOCK,), tl.float32)
    sum_p_B = tl.zeros((BLOCK,), tl.float32)
    sum_q_B = tl.zeros((BLOCK,), tl.float32)
    at_s_B = tl.zeros((BLOCK,), tl.int32)
    at_t_B = tl.zeros((BLOCK,), tl.int32)
    for v0 in range(0, V, BLOCK):
        v_B = v0 + b_B
        s_B = tl.load(s_ptr + v_B, mask=v_B < V, other=-1e30)
        t_B = tl.load(t_ptr + v_B, mask=v_B < V, other=-1e30)
        if TEMPERED:
            over_B = tl.maximum(most_s_B, s_B)
            sum_q_B = sum_q_B * tl.exp2((most_s_B - over_B) * LOG2_E) + tl.exp2((s_B - over_B) * LOG2_E)
        most_s_B, sum_r_B, at_s_B = _more(s_B, v_B, most_s_B, sum_r_B, at_s_B, scale)
        most_t_B, sum_p_B, at_t_B = _more(t_B, v_B, most_t_B, sum_p_B, at_t_B, scale)
    most_s = tl.max(most_s_B, 0)
    most_t = tl.max(most_t_B, 0)
    # logarithms of the normalisers
    norm_r = most_s * scale + tl.log2(tl.sum(sum_r_B * tl.exp2((most_s_B - most_s) * scale), 0))
    norm_p = most_t * scale + tl.log2(tl.sum(sum_p_B * tl.exp2((most_t_B - most_t) * scale), 0))
    norm_q = norm_r
    if TEMPERED:
        norm_q = most_s * LOG2_E + tl.log2(tl.sum(sum_q_B * tl.exp2((most_s_B - most_s) * LOG2_E), 0))
    tl.store(ce_ptr + k, (norm_q - tl.load(s_ptr + label) * LOG2_E) * LN_2)
    agree = _first_best(most_s_B, at_s_B, most_s, V) == _first_best(most_t_B, at_t_B, most_t, V)
    tl.store(agree_ptr + k, agree.to(tl.int64))

    kl_B = tl.zeros((BLOCK,), tl.float32)
    for v0 in range(0, V, BLOCK):
        v_B = v0 + b_B
        s_B = tl.load(s_ptr + v_B, mask=v_B < V, other=-1e30)
        t_B = tl.load(t_ptr + v_B, mask=v_B < V, other=-1e30)
        log_p_B = t_B * scale - norm_p
        log_r_B = s_B * scale - norm_r
        p_B = tl.exp2(log_p_B)
        kl_B += tl.where(v_B < V, p_B * (log_p_B - log_r_B), 0)
        if slope_ptr is not None:
            r_B = tl.exp2(log_r_B)
            q_B = tl.exp2(s_B * LOG2_E - norm_q) if TEMPERED else r_B
            slope_B = a * tau * (r_B - p_B) + b * (q_B - tl.where(v_B == label, 1.0, 0.0))
            tl.store(slope_ptr + k * slope_stride + v_B, slope_B, mask=v_B < V)
    tl.store(kl_ptr + k, tl.sum(kl_B, 0) * LN_2)


def launch(
    s_KV: Tensor, t_KV: Tensor, labels_K: Tensor, a: float, b: float, tau: float, slope_KV: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """kl, ce, agree (K,) of `forward_kl`, the gradient into `slope_KV`; rows of logits must be contiguous."""
    K, V = s_KV.shape
    if s_KV.dtype != torch.float32 or t_KV.dtype != torch.float32:
        raise ValueError(f"logits are {s_KV.dtype} and {t_KV.dtype}, the kernel takes fp32")
    if s_KV.stride(1) != 1 or t_KV.stride(1) != 1 or t_KV.shape != s_KV.shape or labels_K.shape != (K,):
        raise ValueError(
            f"logits {tuple(s_KV.shape)} and {tuple(t_KV.shape)} of rows for {tuple(labels_K.shape)} labels"
        )  # fmt: skip
    kl_K, ce_K = s_KV.new_empty(K), s_KV.new_empty(K)
    agree_K = torch.empty(K, dtype=torch.int64, device=s_KV.device)
    if K:
        _forward_kl[(K,)](
            s_KV, t_KV, labels_K, kl_K, ce_K, agree_K, slope_KV,
            s_KV.stride(0), t_KV.stride(0), 0 if slope_KV is None else slope_KV.stride(0),
            float(a), float(b), float(tau), V, IGNORED=IGNORED, TEMPERED=tau != 1, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return kl_K, ce_K, agree_K
