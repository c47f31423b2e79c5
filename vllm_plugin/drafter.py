"""The drafter of the speculative worker: vLLM's standalone draft model, a whole round of drafts in one CUDA graph.

Shapes: R requests of a graph, of which the first are real, K drafts.

vLLM 0.32 runs a draft model from Python, kernel after kernel, K times a step, which takes longer than the model itself.
Here a round is replayed: the forward over what the step before has left of each request, up to K + 2 tokens (accepted,
corrected, rejected), K - 1 forwards over one token each, sampling and bookkeeping in between. A request may have had
fewer drafts than K, verified fewer (adaptive verification decides that on the device), or end a prompt in so few
tokens; longer ones take vLLM's way. A draft model's mixers need nothing for it: they are rewound by position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator, prepare_prefill_inputs

LAYOUT_BLOCKS = (4, 8, 16, 32, 64, 128, 256, 512)  # of `prepare_prefill_inputs`, by a batch's longest request


class Drafter(StandaloneARSpeculator):
    """vLLM's speculator for `method: draft_model`, with graphs."""

    def __init__(self, vllm_config, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        # what a graph reads beside the parent's buffers
        self.next_seq_lens = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=device)
        self.graphs: CudaGraphManager | None = None

    @property
    def first_tokens(self) -> int:
        """Most tokens of a request in a round's first forward."""
        return self.num_speculative_steps + 2

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Graphs for as many requests as vLLM captures tokens for, where it captures decode steps whole."""
        full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        able = full and self.dp_size == 1 and self.supports_decode_metadata_update
        mode = CUDAGraphMode.FULL_DECODE_ONLY if able else CUDAGraphMode.NONE
        self.graphs = CudaGraphManager(self.vllm_config, self.device, mode, decode_query_len=1)
        for kind, descs in self.graphs._capture_descs.items():
            self.graphs._capture_descs[kind] = [d for d in descs if self._fits(d)]

    def _fits(self, desc: BatchExecutionDescriptor) -> bool:
        """Whether the buffers hold a round's first forward; of few tokens each, a step may have more requests."""
        return desc.num_reqs * self.first_tokens <= len(self.expanded_input_ids)

    def capture(self) -> None:
        assert self.graphs is not None
        if not self.graphs.needs_capture():
            return
        self.idx_mapping.fill_(-1)  # nothing is written to anyone's cache
        self.last_token_indices.zero_()

        def prepare(desc: BatchExecutionDescriptor, warmup: bool):
            R = desc.num_reqs
            starts = self.arange_gpu[: R + 1] * self.first_tokens
            self.input_buffers.query_start_loc[: R + 1].copy_(starts)
            self.input_buffers.seq_lens[:R].fill_(self.first_tokens)
            single = self._build_uniform_attn_metadata(
                batch_desc=desc, num_reqs=R, num_query_per_req=1, seq_lens_cpu_upper_bound=self._bound(R), step=2
            )
            # last, as in every round: builders keep one set of buffers, which the round fills again for single tokens
            first = self._first_metadata(desc, R)
            return lambda _mode: self._round(R, first, single)

        self.graphs.capture(prepare, "Capturing draft rounds")

    def warm_up(self) -> None:
        """Compile vLLM's kernel that lays out a round, for requests of all lengths. It fills buffers that every round
        fills anew."""
        for block in LAYOUT_BLOCKS:
            batch = InputBatch.make_dummy(1, min(block - 2, self.max_num_tokens), self.input_buffers)
            self._lay_out(batch, self.next_seq_lens.long(), self.next_seq_lens[:1])

    def _lay_out(self, input_batch: InputBatch, last_sampled: Tensor, num_rejected: Tensor) -> None:
        """The tokens of a round's first forward, and where each request's begin and end."""
        prepare_prefill_inputs(
            self.input_buffers, input_batch, last_sampled, num_rejected, self.expanded_input_ids,
            self.expanded_positions, self.last_token_indices, self.max_num_reqs, self.max_model_len,
        )  # fmt: skip

    def _bound(self, requests: int) -> Tensor:
        """Upper bound of sequence lengths on the host that holds for every replay."""
        return torch.full((requests,), self.max_model_len, dtype=torch.int32)

    def _first_metadata(self, desc: BatchExecutionDescriptor, requests: int) -> tuple[dict[str, Any], dict]:
        """Metadata and cache places of a round's first forward, for R requests of which so many are real. The host
        takes all for as long as they can be; where each begins and ends stands in query_start_loc on the device."""
        R, T = desc.num_reqs, self.first_tokens
        places = self.block_tables.compute_slot_mappings(
            self.idx_mapping[:R], self.input_buffers.query_start_loc[: R + 1], self.expanded_positions, R * T,
            out=self.expanded_slot_mappings,
        )  # fmt: skip
        whole = BatchExecutionDescriptor(cg_mode=CUDAGraphMode.FULL, num_tokens=R * T, num_reqs=R)
        metadata = self._build_attn_metadata(
            batch_desc=whole, num_reqs=requests, query_start_loc_np=self.arange_np[: requests + 1] * T,
            seq_lens_cpu_upper_bound=self._bound(requests), step=1, slot_mappings=places,
        )  # fmt: skip
        return metadata, build_slot_mappings_by_layer(places, self.kv_cache_config)

    def _draft(self, step: int, hidden: Tensor, positions: Tensor, R: int) -> None:
        self.current_draft_step.fill_(step)
        self.draft_tokens[:R, step] = self.sample_draft(
            hidden, positions, self.idx_mapping[:R], self.temperature, self.seeds, self.current_draft_step,
            self.draft_logits,
        )  # fmt: skip

    def _round(self, R: int, first: tuple[dict[str, Any], dict], single: dict[str, Any]) -> None:
        """All of a round that a graph can hold; every tensor that it reads stays where it is."""
        buffers, tokens = self.input_buffers, R * self.first_tokens
        metadata, places = first
        hidden = self._run_model(
            self.expanded_input_ids[:tokens], self.expanded_positions[:tokens], metadata, places, None
        )
        last = self.last_token_indices[:R]
        positions, seq_lens, starts = buffers.positions[:R], buffers.seq_lens[:R], buffers.query_start_loc[: R + 1]
        positions.copy_(self.expanded_positions[last])
        self._draft(0, hidden[last], positions, R)
        seq_lens.copy_(self.next_seq_lens[:R])
        starts.copy_(self.arange_gpu[: R + 1])
        for step in range(1, self.num_speculative_steps):
            buffers.input_ids[:R].copy_(self.draft_tokens[:R, step - 1])
            torch.clamp(positions + 1, max=self.max_model_len - 1, out=positions)
            torch.clamp(seq_lens + 1, max=self.max_model_len, out=seq_lens)
            mappings = self.block_tables.compute_slot_mappings(self.idx_mapping[:R], starts, positions, R)
            self._update_draft_decode_metadata(single, R)
            by_layer = build_slot_mappings_by_layer(mappings, self.kv_cache_config)
            hidden = self._run_model(buffers.input_ids[:R], positions, single, by_layer, None)
            self._draft(step, hidden[:R], positions, R)

    @torch.inference_mode()
    def propose(
        self, input_batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_sampled,
        num_rejected, last_sampled, next_prefill_tokens, temperature, seeds, *args, **kwargs,
    ) -> Tensor:  # fmt: skip
        """Drafts (R, K) for a batch that has just been verified; see vLLM's speculator."""
        requests = input_batch.num_reqs
        desc = self._graph_of(input_batch) if not kwargs.get("dummy_run") else None
        if desc is None:
            return super().propose(
                input_batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_sampled,
                num_rejected, last_sampled, next_prefill_tokens, temperature, seeds, *args, **kwargs,
            )  # fmt: skip
        assert self.graphs is not None
        self._copy_request_inputs(requests, input_batch.idx_mapping, temperature, seeds)
        self._lay_out(input_batch, last_sampled, num_rejected)
        lengths = input_batch.seq_lens[:requests] - num_rejected[:requests].int() + 1
        self.next_seq_lens[:requests] = lengths.clamp(max=self.max_model_len)
        self.next_seq_lens[requests:].zero_()
        self._first_metadata(desc, requests)
        self.graphs.run_fullgraph(desc)
        return self.draft_tokens[:requests]

    def _graph_of(self, input_batch) -> BatchExecutionDescriptor | None:
        """The graph for this batch, None if a request has more tokens than a verify step, or the batch is too large."""
        requests = input_batch.num_reqs
        if self.graphs is None or (input_batch.num_scheduled_tokens[:requests] >= self.first_tokens).any():
            return None
        desc = self.graphs.dispatch(requests, requests, 1, 0)
        return desc if desc.cg_mode == CUDAGraphMode.FULL and self._fits(desc) else None
