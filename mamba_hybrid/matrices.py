"""The matrices by which an attention and a mixer mix a row's tokens, and how far one is from the other.

Shapes: B rows, L tokens of a row, T query tokens of a piece, J tokens up to its last, H query heads, G key/value heads,
S state heads, P head width, N state width, w window.

A head of attention gives y_t = sum_j A_tj v_j. On its own values x a head of a mixer does the same, with a weight for
each channel p:

    out_tp = sum_j M_tjp x_jp,   M_tjp = gate_tp (n_p W_tj + f_p r_t F_tj)

    A_tj = softmax_j(q_t . k_j / sqrt(P))                                                over j <= t
    W_tj = softmax_j(C_t . B_j / sqrt(N))                                                over t - w < j <= t
    F_tj = exp(-exp(A_log) sum_{i=j+1..t-w} dt_i) dt_j C_t . B_j + D [j = t - w]         over j <= t - w
    r_t  = 1 / rms_p(sum_j F_tj x_jp), of gate_tp times that where the norm is after the gate

and 0 elsewhere; all of it within one document. Values are the mixer's inputs here and are not learnt: as long as its
v_proj and o_proj are the attention's, equal matrices are equal outputs. A convolution mixes tokens, not linearly,
before all this, so with one there is no such matrix.

The error is the mean over the channels of (M - A)^2, summed over j and relative to the sum of A^2. No j has both W and
F, so with a = gate n and b = gate f r no channel needs a matrix of its own:

    mean_p (M_tjp - A_tj)^2 = (mean_p a W_tj + mean_p b F_tj - A_tj)^2 + var_p a W_tj^2 + var_p b F_tj^2

Source: matrix orientation, the first stage of MOHAWK (Bick et al. 2024, arXiv 2408.10189), which fits the matrix of
Mamba-2 to that of the attention; its distance is the Frobenius norm, here it is squared and relative.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from mamba_hybrid_kernels import delay
from torch import Tensor
from torch.utils.checkpoint import checkpoint

PIECE = 2**24  # numbers of one kind of matrix (B x H x T x J) that exist at a time


class MixingFactors(NamedTuple):
    """What a mixer's matrix is made of.

    Args:
        x_BLGP, B_BLGN, C_BLHN: values, keys and queries, rotated.
        dt_BLS: step sizes, positive, fp32.
        A_S: decay rates, negative.
        D_H: weights of the value that has just left the window.
        gate_BLHP: fp32, None without a gate.
        near_HP, far_HP: weights of window and state, n and f; n is None without a window.
        window: w.
        after_gate: the norm is after the gate.
        eps: of the norm.
    """

    x_BLGP: Tensor
    B_BLGN: Tensor
    C_BLHN: Tensor
    dt_BLS: Tensor
    A_S: Tensor
    D_H: Tensor
    gate_BLHP: Tensor | None
    near_HP: Tensor | None
    far_HP: Tensor
    window: int
    after_gate: bool
    eps: float


def matrix_error(
    mixer: MixingFactors, attention: tuple[Tensor, Tensor], doc_BL: Tensor | None, counted_BL: Tensor
) -> Tensor:
    """Squared error of a mixer's matrices relative to the square of an attention's, of all heads together.

    The matrices exist for some query tokens at a time, in the backward pass too, where they are made again.

    Args:
        mixer: its factors.
        attention: queries (B, L, H, P) and keys (B, L, G, P) of the attention, rotated; as many query heads.
        doc_BL: integer document ids (B, L), None for one document a row.
        counted_BL: bool, the query tokens whose rows of the matrices count.

    Returns:
        (B,) fp32.
    """
    q_BLHP, k_BLGP = attention
    x, B, C, dt, A_S, D_H, gate, n_HP, f_HP, w, after_gate, eps = mixer
    rows, L, H, P = q_BLHP.shape
    S, N = len(A_S), C.shape[-1]
    decay_BSL = (dt * A_S).cumsum(1).transpose(1, 2)
    left_BSL = delay(decay_BSL.transpose(1, 2), w).transpose(1, 2)  # up to what has left the window

    def sums(first: int, last: int) -> tuple[Tensor, Tensor]:
        """Of the query tokens from first to before last, counted: error and square (B,)."""
        t = torch.arange(first, last, device=q_BLHP.device)[:, None]
        j = torch.arange(last, device=q_BLHP.device)
        seen = (j <= t)[None]
        if doc_BL is not None:
            seen = seen & (doc_BL[:, first:last, None] == doc_BL[:, None, :last])
        seen = seen[:, None]  # B 1 T J

        scores = products(q_BLHP[:, first:last], k_BLGP[:, :last]) / P**0.5
        A_BHTJ = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        dots = products(C[:, first:last], B[:, :last])
        far = seen & (j <= t - w)
        weight = (
            (left_BSL[:, :, first:last, None] - decay_BSL[:, :, None, :last]).masked_fill(~far, float("-inf")).exp()
        )
        weight = weight * dt[:, :last].transpose(1, 2)[:, :, None]
        F_BHTJ = (dots.unflatten(1, (S, -1)) * weight[:, :, None]).flatten(1, 2)
        F_BHTJ = F_BHTJ + D_H[:, None, None] * (seen & (j == t - w))

        gate_BHTP = 1.0 if gate is None else gate[:, first:last].transpose(1, 2)
        y_BHTP = values(F_BHTJ, x[:, :last])
        normed = y_BHTP * gate_BHTP if after_gate else y_BHTP
        r_BHT1 = torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
        var, mean = torch.var_mean(gate_BHTP * f_HP[:, None] * r_BHT1, -1, correction=0)
        M_BHTJ, spread = mean[..., None] * F_BHTJ, var * F_BHTJ.pow(2).sum(-1)
        if n_HP is not None:
            W_BHTJ = (dots / N**0.5).masked_fill(~(seen & ~far), float("-inf")).softmax(-1)
            var, mean = torch.var_mean(gate_BHTP * n_HP[:, None], -1, correction=0)
            M_BHTJ, spread = M_BHTJ + mean[..., None] * W_BHTJ, spread + var * W_BHTJ.pow(2).sum(-1)
        counted = counted_BL[:, None, first:last]
        error_BHT = (M_BHTJ - A_BHTJ).pow(2).sum(-1) + spread
        return (error_BHT * counted).sum((1, 2)), (A_BHTJ.pow(2).sum(-1) * counted).sum((1, 2))

    step = max(1, PIECE // (rows * H * L))
    parts = [
        checkpoint(sums, at, min(at + step, L), use_reentrant=False, preserve_rng_state=False)
        for at in range(0, L, step)
    ]
    error_B, whole_B = (torch.stack(kind).sum(0) for kind in zip(*parts, strict=True))
    return error_B / whole_B.clamp(min=1e-30)


def products(q_BTHN: Tensor, k_BJGN: Tensor) -> Tensor:
    """Each query with each key of its group (B, H, T, J), fp32; keys are not repeated."""
    T, G = q_BTHN.shape[1], k_BJGN.shape[2]
    q = q_BTHN.float().transpose(1, 2).unflatten(1, (G, -1)).flatten(2, 3)
    return (q @ k_BJGN.float().permute(0, 2, 3, 1)).unflatten(2, (-1, T)).flatten(1, 2)


def values(weight_BHTJ: Tensor, x_BJGP: Tensor) -> Tensor:
    """The groups' values, weighed (B, H, T, P), fp32."""
    T, G = weight_BHTJ.shape[2], x_BJGP.shape[2]
    weight = weight_BHTJ.unflatten(1, (G, -1)).flatten(2, 3)
    return (weight @ x_BJGP.float().transpose(1, 2)).unflatten(2, (-1, T)).flatten(1, 2)
