"""What `generate` keeps between tokens: keys and values of the attention layers, a slot a row of each mixer."""

from __future__ import annotations

import torch
from mamba_hybrid_kernels import SlotLayout, SlotTensors
from torch import Tensor

from .config import HybridMambaConfig


class HybridCache:
    """Cache of one batch; row b of a mixer layer is its slot b.

    Args:
        config: the model's.
        batch: rows.
        dtype: of the activations.
        device: where it lies.
    """

    is_compileable = False

    def __init__(self, config: HybridMambaConfig, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        self.layout: SlotLayout = config.slot_layout(dtype=dtype)
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}
        self.slots = {i: SlotTensors.allocate(self.layout, batch, device) for i in config.mixer_layers}
        self.length = 0  # columns seen, padding included
        self.tokens = [0] * batch  # real tokens of each row: the position of its next one

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far."""
        return self.length

    def append(self, layer: int, k_BGLN: Tensor, v_BGLP: Tensor) -> tuple[Tensor, Tensor]:
        """Put an attention layer's new keys and values behind the old ones; returns all of them."""
        if layer in self.kv:
            k_BGLN = torch.cat([self.kv[layer][0], k_BGLN], 2)
            v_BGLP = torch.cat([self.kv[layer][1], v_BGLP], 2)
        self.kv[layer] = (k_BGLN, v_BGLP)
        return k_BGLN, v_BGLP

    def advance(self, valid_BL: Tensor) -> None:
        """A forward pass over these columns has ended."""
        self.length += valid_BL.shape[1]
        self.tokens = [n + m for n, m in zip(self.tokens, valid_BL.sum(1).tolist(), strict=True)]

    def reorder_cache(self, order: Tensor) -> None:
        """Row i becomes what row order[i] was (beam search)."""
        self.kv = {i: (k[order], v[order]) for i, (k, v) in self.kv.items()}
        self.slots = {i: s.select(order) for i, s in self.slots.items()}
        self.tokens = [self.tokens[i] for i in order.tolist()]
