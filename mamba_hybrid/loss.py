"""Distillation loss with both language-model heads inside a loop over chunks of tokens.

Shapes: M tokens, D student width, E teacher width, V vocabulary, K tokens of one chunk.

Logits of K tokens exist at a time, of both models, and their gradient takes the place of the student's, so that
neither model's M x V logits ever do. The gradients are made in the same pass: the backward pass scales them.

With p the teacher's and r the student's distribution at the temperature and z the student's logits over it, a
divergence D of them has the gradient dD/dz_i = r_i (g_i - sum_j r_j g_j) with g = dD/dr:

    forward   KL(p || r)                                    r - p
    reverse   KL(r || p)                                    r (log(r/p) - D)
    skewed    KL(p || m), m = skew p + (1 - skew) r         (1 - skew) r (sum_j r_j p_j/m_j - p/m)
    js        beta KL(p || m) + (1 - beta) KL(r || m),      (1 - beta) r (log(r/m) - KL(r || m))
              m = beta p + (1 - beta) r

Sources: skewed is DistiLLM's (Ko et al. 2024, arXiv 2402.03898), js the generalised Jensen-Shannon divergence of GKD
(Agarwal et al. 2023, arXiv 2306.13649).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from mamba_hybrid_kernels import ForwardKL, forward_kl
from mamba_hybrid_kernels.forward_kl import IGNORED, labelled, log_shares
from torch import Tensor


class Distillation(NamedTuple):
    """Sums over the tokens that count; divide by `tokens` for means.

    Args:
        loss: kl_weight temperature^2 divergence + ce_weight ce, scalar; the only one with a gradient.
        kl: of KL(teacher || student) in nats, entropy of the teacher included, at the temperature; scalar. It is that
            whatever divergence is trained on, so that runs compare.
        ce: of the student's cross-entropy with the labels in nats, scalar.
        agree: tokens that both rank first, scalar int64.
        tokens: how many count, scalar int64.
    """

    loss: Tensor
    kl: Tensor
    ce: Tensor
    agree: Tensor
    tokens: Tensor


def distillation_loss(
    student_MD: Tensor,
    student_head_VD: Tensor,
    teacher_ME: Tensor,
    teacher_head_VE: Tensor,
    labels_M: Tensor,
    *,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    chunk_tokens: int = 512,
    divergence: str = "forward",
    skew: float = 0.1,
    beta: float = 0.5,
) -> Distillation:
    """Weighted sum of a divergence of teacher and student and the student's cross-entropy over the tokens with a label.

    Logits, softmax and sums are fp32 (fp64 for fp64 inputs). The gradient of the divergence is taken at the temperature
    and scaled by its square, which keeps its size comparable to the cross-entropy's.

    Args:
        student_MD: the student's normed hidden states (M, D), any float dtype.
        student_head_VD: its head (V, D), the same dtype, or an fp32 master, which is cast to it; the gradient is of the
            head's own dtype.
        teacher_ME, teacher_head_VE: the teacher's, without gradient; its width E may differ.
        labels_M: (M,) int64, the token that follows, -100 where neither term counts.
        kl_weight, ce_weight: of the two terms.
        temperature: both logits are divided by it in the divergence.
        chunk_tokens: tokens whose logits exist at a time.
        divergence: "forward" for KL(teacher || student), "reverse", "skewed" or "js"; formulas above.
        skew: the teacher's share of the mixture that "skewed" compares with, between 0 and 1.
        beta: the teacher's share in "js", between 0 and 1.

    Returns:
        The sums; see `Distillation`.

    Raises:
        ValueError: shapes that do not fit, a chunk or temperature that is not positive, an unknown divergence, a share
            that is none.

    Example:
        >>> h, w = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8)
        >>> out = distillation_loss(h, w, torch.randn(5, 4), torch.randn(11, 4), torch.arange(5), chunk_tokens=2)
        >>> (out.loss / out.tokens).backward()
    """
    M = len(labels_M)
    if len(student_MD) != M or len(teacher_ME) != M:
        raise ValueError(f"{len(student_MD)} student and {len(teacher_ME)} teacher tokens for {M} labels")
    if len(student_head_VD) != len(teacher_head_VE):
        raise ValueError(f"vocabularies of {len(student_head_VD)} and {len(teacher_head_VE)} tokens")
    if chunk_tokens < 1 or temperature <= 0:
        raise ValueError(f"chunk_tokens {chunk_tokens} and temperature {temperature} must be positive")
    check_divergence(divergence, skew, beta)
    grad = torch.is_grad_enabled()  # inside the function it is always off
    return Distillation(
        *_ChunkedDistillation.apply(
            student_MD,
            student_head_VD,
            teacher_ME,
            teacher_head_VE,
            labels_M,
            (kl_weight, ce_weight, temperature, chunk_tokens, grad and student_MD.requires_grad),
            grad and student_head_VD.requires_grad,
            None if divergence == "forward" else (OTHERS[divergence], {"skewed": skew, "js": beta}.get(divergence)),
        )
    )


def check_divergence(divergence: str, skew: float, beta: float) -> None:
    """Raises ValueError for a divergence that there is not, or a share that is not between 0 and 1."""
    if divergence != "forward" and divergence not in OTHERS:
        raise ValueError(f"divergence {divergence!r} is none of forward, {', '.join(OTHERS)}")
    for name, share in (("skew", skew), ("beta", beta)):
        if not 0 < share < 1:
            raise ValueError(f"{name} {share} must be between 0 and 1, both left out")


def _reverse(log_p_KV: Tensor, log_r_KV: Tensor, _: None) -> tuple[Tensor, Tensor]:
    """(value (K,), gradient with respect to the student's logits over the temperature (K, V)), as the others."""
    r_KV = log_r_KV.exp()
    ratio_KV = log_r_KV - log_p_KV
    value_K = (r_KV * ratio_KV).sum(-1)
    return value_K, ratio_KV.sub_(value_K[:, None]).mul_(r_KV)


def _mixture(log_p_KV: Tensor, log_r_KV: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) r)."""
    return torch.logaddexp(log_p_KV + math.log(share), log_r_KV + math.log1p(-share))


def _skewed(log_p_KV: Tensor, log_r_KV: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    log_ratio_KV = log_p_KV - _mixture(log_p_KV, log_r_KV, skew)
    value_K = (log_p_KV.exp() * log_ratio_KV).sum(-1)
    r_KV = log_r_KV.exp()
    pulled_KV = log_ratio_KV.exp_().mul_(r_KV)  # p/m is at most 1/skew
    total_K1 = pulled_KV.sum(-1, keepdim=True)
    return value_K, r_KV.mul_(total_K1).sub_(pulled_KV).mul_(1 - skew)


def _js(log_p_KV: Tensor, log_r_KV: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    log_m_KV = _mixture(log_p_KV, log_r_KV, beta)
    teacher_K = (log_p_KV.exp() * (log_p_KV - log_m_KV)).sum(-1)
    r_KV = log_r_KV.exp()
    ratio_KV = torch.sub(log_r_KV, log_m_KV, out=log_m_KV)
    student_K = (r_KV * ratio_KV).sum(-1)
    slope_KV = ratio_KV.sub_(student_K[:, None]).mul_(r_KV).mul_(1 - beta)
    return beta * teacher_K + (1 - beta) * student_K, slope_KV


OTHERS: dict[str, Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]]] = {
    "reverse": _reverse, "skewed": _skewed, "js": _js,
}  # fmt: skip


def factor(head_VD: Tensor, hidden_MD: Tensor, acc: torch.dtype) -> Tensor:
    """The head as hidden states are multiplied with it: made once, not in every chunk; see `product`."""
    head_VD = head_VD.to(hidden_MD.dtype)
    return head_VD if hidden_MD.is_cuda else head_VD.to(acc)


def product(a: Tensor, b: Tensor, acc: torch.dtype, add: Tensor | None = None) -> Tensor:
    """a @ b + add, accumulated and returned in `acc`, in place of `add`; a and b are in `acc`, or on a GPU."""
    if a.dtype != acc:  # half-precision inputs, fp32 out of the tensor cores
        return torch.mm(a, b, out_dtype=acc) if add is None else torch.addmm(add, a, b, out_dtype=acc, out=add)
    # not addmm_, which PyTorch's FLOP counter leaves out
    return a @ b if add is None else torch.addmm(add, a, b, out=add)


def _other(s_KV, t_KV, labels_K, other, setting, slope) -> tuple[ForwardKL, Tensor]:
    """As `forward_kl`, with the slope of another divergence and its value."""
    a, b, tau, *_ = setting
    log_p_KV, log_r_KV, log_q_KV, ce, agree = log_shares(s_KV, t_KV, labels_K, tau)
    ignored_K = labels_K == IGNORED
    value_K, slope_KV = other[0](log_p_KV, log_r_KV, other[1])
    p_KV = log_p_KV.exp()
    kl = log_p_KV.sub_(log_r_KV).mul_(p_KV).sum(-1).masked_fill(ignored_K, 0).sum()
    value = value_K.masked_fill(ignored_K, 0).sum()
    if slope is None:
        return ForwardKL(kl, ce, agree, None), value
    slope_KV = slope_KV.mul_(a * tau).add_(log_q_KV.exp_(), alpha=b)
    return ForwardKL(kl, ce, agree, labelled(slope_KV, labels_K, b).to(slope)), value


class _ChunkedDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student_MD, student_head_VD, teacher_ME, teacher_head_VE, labels_M, setting, head_grad, other
    ):
        a, b, tau, chunk, hidden_grad = setting
        acc = torch.promote_types(student_MD.dtype, torch.float32)
        head_dtype = student_head_VD.dtype
        student_head_VD = factor(student_head_VD, student_MD, acc)
        if not student_MD.is_cuda:
            teacher_head_VE = teacher_head_VE.to(acc)
        inner = student_head_VD.dtype
        teacher_inner = teacher_head_VE.dtype
        kl, ce, value = student_MD.new_zeros(3, dtype=acc).unbind()
        agree = torch.zeros((), dtype=torch.int64, device=labels_M.device)
        grad_MD = torch.empty_like(student_MD) if hidden_grad else None
        grad_VD = None
        for at in range(0, len(labels_M), chunk):
            span = slice(at, at + chunk)
            h_KD = student_MD[span].to(inner)
            s_KV = product(h_KD, student_head_VD.t(), acc)
            t_KV = product(teacher_ME[span].to(teacher_inner), teacher_head_VE.t(), acc)
            wanted = inner if hidden_grad or head_grad else None
            if other is None:
                part = forward_kl(
                    s_KV, t_KV, labels_M[span], kl_weight=a, ce_weight=b, temperature=tau, slope=wanted
                )  # fmt: skip
            else:
                part, more = _other(s_KV, t_KV, labels_M[span], other, setting, wanted)
                value += more
            del s_KV, t_KV
            kl += part.kl
            ce += part.ce
            agree += part.agree
            d_KV = part.slope
            if d_KV is None:
                continue
            if grad_MD is not None:
                grad_MD[span] = product(d_KV, student_head_VD, acc)
            if head_grad:
                grad_VD = product(d_KV.t(), h_KD, acc, grad_VD)
            del part, d_KV  # or it would be there beside the next chunk's
        ctx.save_for_backward(grad_MD, grad_VD)
        ctx.head_dtype = head_dtype
        tokens = (labels_M != IGNORED).sum()
        loss = a * tau**2 * (kl if other is None else value) + b * ce
        ctx.mark_non_differentiable(kl, ce, agree, tokens)
        return loss, kl, ce, agree, tokens

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_MD, grad_VD = ctx.saved_tensors
        hidden = None if grad_MD is None else grad_MD * upstream.to(grad_MD.dtype)
        head = None if grad_VD is None else (grad_VD * upstream).to(ctx.head_dtype)
        return hidden, head, None, None, None, None, None, None
