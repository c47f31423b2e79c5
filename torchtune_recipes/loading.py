"""Weights into a sharded model: each process reads its own rows of each tensor, and no others."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mamba_hybrid.checkpoint import make_buffers

from .models import Wrapped, plain_name


class Tensors(Protocol):
    """Where tensors are found by name, such as `mamba_hybrid.source.Source`."""

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its rows."""


def fill(module: Wrapped, source: Tensors, device: torch.device, *, offload: bool = False) -> None:
    """Give a model that was sharded on the meta device its numbers.

    No more host memory is needed than the process's shards (on a GPU, one tensor's shard), whatever the model's size.

    Args:
        module: sharded along the parameters' first dimension, as `shard` does.
        source: the checkpoint that it was opened with.
        device: to compute on.
        offload: the parameters are to be in host memory, as in `shard`.

    Raises:
        UserError: a tensor cannot be read.
    """
    module.to_empty(device="cpu" if offload else device)
    module.model.tie_weights()  # FSDP's parameters are tied still, others no more
    make_buffers(module.model)
    module.model.model.rotary_emb.to(device)
    for name, p in module.model.named_parameters():
        mine, start = p.detach(), 0
        if isinstance(p, DTensor):
            mine, start = p.to_local().detach(), _first_row(p)
        if len(mine):
            mine.copy_(source.tensor(plain_name(name), slice(start, start + len(mine))))


def _first_row(p: DTensor) -> int:
    """Of the rows that this process holds: each holds as many as the first, the last ones fewer or none."""
    dim = next(i for i, placement in enumerate(p.placements) if placement.is_shard(0))
    return -(-len(p) // p.device_mesh.size(dim)) * p.device_mesh.get_local_rank(dim)
