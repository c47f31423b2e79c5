"""Forward KL and cross-entropy of rows of logits, with their gradient.

Shapes: K tokens, V vocabulary. With t and s the teacher's and the student's logits, tau the temperature:

    p = softmax(t / tau), r = softmax(s / tau), q = softmax(s)
    kl = sum_v p_v (log p_v - log r_v),  ce = -log q_label
    slope = a tau (r - p) + b (q - onehot(label)), the gradient of a tau^2 kl + b ce with respect to s
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100  # label of a token that does not count, as everywhere in PyTorch


class ForwardKL(NamedTuple):
    """Sums over the tokens with a label, and the gradient.

    Args:
        kl: in nats, scalar.
        ce: in nats, scalar.
        agree: tokens that both rank first, scalar int64.
        slope: (K, V), 0 for tokens without a label; None where it was not asked for.
    """

    kl: Tensor
    ce: Tensor
    agree: Tensor
    slope: Tensor | None


def forward_kl(
    s_KV: Tensor,
    t_KV: Tensor,
    labels_K: Tensor,
    *,
    kl_weight: float,
    ce_weight: float,
    temperature: float,
    slope: torch.dtype | None,
    backend: str | None = None,
) -> ForwardKL:
    """KL(teacher || student) at a temperature and the student's cross-entropy.

    Args:
        s_KV, t_KV: logits of student and teacher, fp32 (fp64 by the reference); both are used up.
        labels_K: int64, -100 for a token that does not count.
        kl_weight, ce_weight: a and b.
        temperature: tau.
        slope: dtype of the gradient, None for none.
        backend: "triton" or "reference"; None is Triton on a GPU.

    Example:
        >>> s, t = torch.randn(2, 5), torch.randn(2, 5)
        >>> out = forward_kl(s, t, torch.tensor([1, -100]), kl_weight=1, ce_weight=0, temperature=1, slope=s.dtype)
        >>> out.slope.shape
        torch.Size([2, 5])
    """
    if backend is None:
        backend = "triton" if s_KV.is_cuda and s_KV.dtype == torch.float32 else "reference"
    if backend == "triton":
        slope_KV = None if slope is None else torch.empty_like(s_KV, dtype=slope, memory_format=torch.contiguous_format)
        kl_K, ce_K, agree_K = forward_kl_op(s_KV, t_KV, labels_K, kl_weight, ce_weight, temperature, slope_KV)
        return ForwardKL(kl_K.sum(), ce_K.sum(), agree_K.sum(), slope_KV)
    tau, a, b = temperature, kl_weight, ce_weight
    log_p_KV, log_r_KV, log_q_KV, ce, agree = log_shares(s_KV, t_KV, labels_K, tau)
    p_KV = log_p_KV.exp()
    kl = log_p_KV.sub_(log_r_KV).mul_(p_KV).sum(-1).masked_fill(labels_K == IGNORED, 0).sum()
    if slope is None:
        return ForwardKL(kl, ce, agree, None)
    if tau == 1:
        slope_KV = log_q_KV.exp_().mul_(a + b).sub_(p_KV, alpha=a)
    else:
        slope_KV = log_r_KV.exp_().mul_(a * tau).add_(log_q_KV.exp_(), alpha=b).sub_(p_KV, alpha=a * tau)
    return ForwardKL(kl, ce, agree, labelled(slope_KV, labels_K, b).to(slope))


def log_shares(s_KV: Tensor, t_KV: Tensor, labels_K: Tensor, tau: float) -> tuple[Tensor, ...]:
    """log p, log r, log q (K, V; r is q at the temperature 1), ce and agree; both logits are used up."""
    valid_K, label_K1 = labels_K != IGNORED, labels_K.clamp(min=0)[:, None]
    agree = ((s_KV.argmax(-1) == t_KV.argmax(-1)) & valid_K).sum()
    log_p_KV = t_KV.div_(tau).log_softmax(-1)
    log_q_KV = s_KV.log_softmax(-1)
    ce = -log_q_KV.gather(-1, label_K1)[:, 0].masked_fill(~valid_K, 0).sum()
    log_r_KV = log_q_KV if tau == 1 else s_KV.div_(tau).log_softmax(-1)
    return log_p_KV, log_r_KV, log_q_KV, ce, agree


def labelled(slope_KV: Tensor, labels_K: Tensor, b: float) -> Tensor:
    """The slope, in place, with its term of the labels, - b onehot(label), and 0 for tokens without one."""
    label_K1 = labels_K.clamp(min=0)[:, None]
    slope_KV.scatter_add_(-1, label_K1, torch.full_like(label_K1, -b, dtype=slope_KV.dtype))
    return slope_KV.masked_fill_((labels_K == IGNORED)[:, None], 0)


@torch.library.custom_op("mamba_hybrid::forward_kl", mutates_args=("slope_KV",))
def forward_kl_op(
    s_KV: Tensor, t_KV: Tensor, labels_K: Tensor, a: float, b: float, tau: float, slope_KV: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel as an operator, which tensors without content can pass through: kl, ce, agree (K,)."""
    from .forward_kl_launch import launch  # Triton is needed to run, not to import

    return launch(s_KV, t_KV, labels_K, a, b, tau, slope_KV)


@forward_kl_op.register_fake
def _(s_KV, t_KV, labels_K, a, b, tau, slope_KV):
    K = len(labels_K)
    return s_KV.new_empty(K), s_KV.new_empty(K), torch.empty(K, dtype=torch.int64, device=s_KV.device)
