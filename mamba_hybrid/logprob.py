"""Log-probabilities of sequences with the language-model head inside a loop over chunks of tokens.

Shapes: M tokens that count, of all sequences, D model width, V vocabulary, K tokens of one chunk, S sequences.

Logits of K tokens exist at a time. What is learnt from a sequence's log-probability is known only when all are there
(a preference loss compares two), so the backward pass makes the logits again instead of keeping M x V of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .loss import factor, product


def sequence_log_probs(
    hidden_MD: Tensor, head_VD: Tensor, labels_M: Tensor, sizes_S: Tensor, *, chunk_tokens: int = 512
) -> Tensor:
    """Sum of the log-probabilities of each sequence's tokens.

    Logits, softmax and sums are fp32 (fp64 for fp64 inputs).

    Args:
        hidden_MD: normed hidden states (M, D) that predict the tokens that count, sequence after sequence, any float
            dtype.
        head_VD: the head (V, D), the same dtype, or an fp32 master, which is cast to it.
        labels_M: (M,) int64, the token that follows each.
        sizes_S: (S,) int64, tokens of each sequence, at least 1; their sum is M.
        chunk_tokens: tokens whose logits exist at a time.

    Returns:
        (S,) in nats, with gradients for the hidden states and the head.

    Raises:
        ValueError: shapes that do not fit, a chunk that is not positive.

    Example:
        >>> h, w = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8)
        >>> log_probs_S = sequence_log_probs(h, w, torch.arange(5), torch.tensor([2, 3]), chunk_tokens=2)
        >>> (log_probs_S[0] - log_probs_S[1]).backward()
    """
    if hidden_MD.dim() != 2 or hidden_MD.shape[1:] != head_VD.shape[1:] or labels_M.shape != hidden_MD.shape[:1]:
        raise ValueError(
            f"hidden states {tuple(hidden_MD.shape)}, head {tuple(head_VD.shape)} and labels {tuple(labels_M.shape)}"
        )
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens {chunk_tokens} must be positive")
    log_probs_M = _ChunkedLogProbs.apply(hidden_MD, head_VD, labels_M, chunk_tokens)
    # unsafe leaves out a check of the sizes, for which a GPU would have to be waited for
    return torch.segment_reduce(log_probs_M, "sum", lengths=sizes_S, unsafe=True)


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, head_VD: Tensor, labels_M: Tensor, chunk: int) -> Tensor:
        acc = torch.promote_types(hidden_MD.dtype, torch.float32)
        inner_VD = factor(head_VD, hidden_MD, acc)
        log_probs_M, norm_M = hidden_MD.new_empty(2, len(labels_M), dtype=acc).unbind()
        for at in range(0, len(labels_M), chunk):
            span = slice(at, at + chunk)
            logits_KV = product(hidden_MD[span].to(inner_VD.dtype), inner_VD.t(), acc)
            norm_M[span] = logits_KV.logsumexp(-1)
            log_probs_M[span] = logits_KV.gather(-1, labels_M[span, None])[:, 0] - norm_M[span]
            del logits_KV  # or two chunks' logits would stand side by side
        ctx.save_for_backward(hidden_MD, head_VD, labels_M, norm_M)
        ctx.chunk, ctx.acc = chunk, acc
        return log_probs_M

    @staticmethod
    def backward(ctx: Any, upstream_M: Tensor) -> tuple[Tensor | None, ...]:
        hidden_MD, head_VD, labels_M, norm_M = ctx.saved_tensors
        acc, inner_VD = ctx.acc, factor(head_VD, hidden_MD, ctx.acc)
        grad_MD = torch.empty_like(hidden_MD) if ctx.needs_input_grad[0] else None
        grad_VD = torch.zeros_like(head_VD, dtype=acc) if ctx.needs_input_grad[1] else None
        for at in range(0, len(labels_M), ctx.chunk):
            span = slice(at, at + ctx.chunk)
            h_KD, up_K1 = hidden_MD[span].to(inner_VD.dtype), upstream_M[span, None]
            # upstream (onehot - p)
            d_KV = product(h_KD, inner_VD.t(), acc).sub_(norm_M[span, None]).exp_().mul_(-up_K1)
            d_KV = d_KV.scatter_add_(-1, labels_M[span, None], up_K1).to(inner_VD.dtype)
            if grad_MD is not None:
                grad_MD[span] = product(d_KV, inner_VD, acc)
            if grad_VD is not None:
                product(d_KV.t(), h_KD, acc, grad_VD)
            del d_KV
        return grad_MD, None if grad_VD is None else grad_VD.to(head_VD.dtype), None, None
