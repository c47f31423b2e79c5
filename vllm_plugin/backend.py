"""Attention backend of the mixer layers: which sequence stands where in a batch, and in which slot.

Shapes: M tokens of the batch's live rows, one row after another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID, mamba_get_block_table_tensor


@dataclass
class MixerMetadata:
    """Rows of a batch that are sequences (padding rows are left out).

    Args:
        slot_ids: block that is the row's slot.
        starts: position of its first token in this batch.
        lengths: tokens of it in this batch.
        tokens_M: int64, where their tokens stand in the batch.
        positions_M: int64, and at which position of their sequences.
    """

    slot_ids: list[int]
    starts: list[int]
    lengths: list[int]
    tokens_M: Tensor
    positions_M: Tensor


class MixerMetadataBuilder(AttentionMetadataBuilder[MixerMetadata]):
    """Builds it from the scheduler's numbers alone. It needs no count of accepted tokens, which vLLM hands to its
    own builders only."""

    # the rows' numbers are read on the host
    _cudagraph_support = AttentionCGSupport.NEVER
    reorder_batch_threshold = None

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **_: Any,
    ) -> MixerMetadata:
        """Metadata of one batch; see the base class."""
        m = common_attn_metadata
        table = mamba_get_block_table_tensor(
            m.block_table_tensor, m.seq_lens, self.kv_cache_spec, self.vllm_config.cache_config.mamba_cache_mode
        )
        offsets = m.query_start_loc_cpu.tolist()
        rows = [
            (slot, start, first, end - first)
            for slot, start, first, end in zip(
                table[:, 0].tolist(), m.compute_num_computed_tokens().tolist(), offsets, offsets[1:], strict=False
            )
            if slot != NULL_BLOCK_ID and end > first
        ]
        tokens = [torch.arange(first, first + n) for _, _, first, n in rows]
        positions = [torch.arange(start, start + n) for _, start, _, n in rows]
        nothing = torch.empty(0, dtype=torch.int64)
        return MixerMetadata(
            [slot for slot, *_ in rows],
            [start for _, start, *_ in rows],
            [n for *_, n in rows],
            torch.cat([nothing, *tokens]).to(self.device),
            torch.cat([nothing, *positions]).to(self.device),
        )


class MixerBackend(AttentionBackend):
    """What vLLM asks about the mixer layers' backend."""

    @staticmethod
    def get_name() -> str:
        return "HYBRID_MIXER"

    @staticmethod
    def get_impl_cls():
        raise NotImplementedError("a mixer layer computes its step itself")

    @staticmethod
    def get_builder_cls() -> type[MixerMetadataBuilder]:
        return MixerMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True
