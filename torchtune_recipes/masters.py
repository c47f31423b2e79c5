"""fp32 parameters that compute in another dtype, on one process.

FSDP's mixed precision gives its units the parameters in the dtype, copied; these cast theirs where they are multiplied
with, and once more in the backward pass, so that no copy is kept between, and cast the gradients. The numbers are
FSDP's, but for the gradients of embeddings and head, which are fp32 throughout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.float8.float8_linear import Float8Linear
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mamba_hybrid.mixer import MixerCore, StepLinear, ZeroLinear


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, *([x] if ctx.needs_input_grad[1] else []))
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        weight, *x = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        grad_x = upstream @ weight.to(upstream.dtype) if to_x else None
        grad_weight = grad_bias = None
        if to_weight:
            grad_weight = (upstream.flatten(0, -2).t() @ x[0].flatten(0, -2)).to(weight.dtype)
        if to_bias:
            grad_bias = upstream.flatten(0, -2).sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_bias


class MasterLinear(nn.Linear):
    """A linear layer in its input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self.weight, self.bias)


class MasterNorm(LlamaRMSNorm):
    """Llama's RMSNorm in its input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight.to(x.dtype) * h.to(x.dtype)


class MasterEmbedding(nn.Embedding):
    """Embeddings in `computes`."""

    computes: torch.dtype

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(self.computes)


MASTERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: MasterLinear, ZeroLinear: MasterLinear, StepLinear: MasterLinear,
    LlamaRMSNorm: MasterNorm, nn.Embedding: MasterEmbedding,
}  # fmt: skip
# which are fp32 throughout, and which cast by themselves
AS_THEY_ARE = (MixerCore, Float8Linear)


def compute_in(module: nn.Module, dtype: torch.dtype) -> None:
    """Let a model of fp32 parameters compute in a dtype; the losses, which multiply with the head, cast it themselves.

    Args:
        module: whose submodules are changed.
        dtype: of the hidden states.

    Raises:
        TypeError: a submodule of another kind has parameters.
    """
    for m in module.modules():
        kind = type(m)
        if isinstance(m, AS_THEY_ARE) or not list(m.parameters(recurse=False)):
            continue
        if kind not in MASTERS:
            raise TypeError(f"{kind.__name__} has parameters, and nothing says how it computes in {dtype}")
        m.__class__ = MASTERS[kind]
        if isinstance(m, MasterEmbedding):
            m.computes = dtype
            # where the head is the same parameter its gradient has all rows: these need no zeros for all the others,
            # but are added in any order
            tied = any(p is m.weight for n in module.modules() if n is not m for p in n.parameters(recurse=False))
            m.sparse = tied and not torch.are_deterministic_algorithms_enabled()
