"""Attention backend of the mixer layers: which sequence stands where in a batch, and in which slot."""

from __future__ import annotations

from typing import Any

import torch
from mamba_hybrid_kernels import StepRows
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID, mamba_get_block_table_tensor


class MixerMetadataBuilder(AttentionMetadataBuilder[StepRows]):
    """Builds a step's rows from the scheduler's numbers alone, on the device. It needs no count of accepted tokens,
    which vLLM hands to its own builders only."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    supports_draft_decode_metadata_update = True

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        # a CUDA graph reads these, so their addresses stay
        rows = vllm_config.scheduler_config.max_num_seqs
        self.slot_R, self.start_R, self.first_R1 = (
            torch.zeros(size, dtype=torch.int32, device=device) for size in (rows, rows, rows + 1)
        )

    @classmethod
    def get_varlen_cudagraph_max_query_len(cls, vllm_config, kv_cache_spec) -> int | None:
        """A captured step takes rows of any length up to that of a verify step."""
        return vllm_config.num_speculative_tokens + 1

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **_: Any,
    ) -> StepRows:
        """Rows of one batch; see the base class."""
        m = common_attn_metadata
        table = mamba_get_block_table_tensor(
            m.block_table_tensor, m.seq_lens, self.kv_cache_spec, self.vllm_config.cache_config.mamba_cache_mode
        )
        R = m.num_reqs
        slot_R, start_R, first_R1 = self.slot_R[:R], self.start_R[:R], self.first_R1[: R + 1]
        # rows without tokens are padding, whatever the table says
        absent_R = (table[:R, 0] == NULL_BLOCK_ID) | (m.naive_query_lens()[:R] == 0)
        slot_R.copy_(torch.where(absent_R, -1, table[:R, 0]))
        start_R.copy_(m.compute_num_computed_tokens()[:R])
        first_R1.copy_(m.query_start_loc[: R + 1])
        self.source = m.seq_lens, m.query_start_loc
        lengths = m.query_start_loc_cpu[: R + 1].diff().tolist()
        return StepRows(slot_R, start_R, first_R1, lengths, m.max_query_len)

    def update_draft_decode_metadata(self, metadata: StepRows) -> None:
        """The rows of the next draft step, in place, inside a CUDA graph: same slots, later starts."""
        R = len(metadata.slot_R)
        seq_lens, query_start_loc = self.source
        metadata.first_R1.copy_(query_start_loc[: R + 1])
        metadata.start_R.copy_(seq_lens[:R] - query_start_loc[: R + 1].diff())


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

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Adaptive verification cuts drafts on the device; a slot is addressed by position, whatever was cut."""
        return True
