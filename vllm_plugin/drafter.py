"""The drafter of the speculative worker: vLLM's standalone draft model, a round of drafts in two CUDA graphs.

Shapes: R requests of a graph, of which the first are real; T tokens of a request at most; N drafts of K at most.

vLLM 0.32 runs a draft model from Python, kernel after kernel, K times a step, which takes longer than the model itself.
Here a round is replayed: it reads what the step before has left of each request (accepted, corrected and rejected
tokens, up to K + 2), and then drafts, by N - 1 forwards over one token each, with sampling and bookkeeping in between.
A request may have had fewer drafts than the step made, verified fewer (adaptive verification decides that on the
device), or end a prompt in so few tokens; longer ones are read as vLLM reads them, and then drafted for in a graph. A
draft model's mixers need nothing for it: they are rewound by position.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator, prepare_prefill_inputs

from .draft_choice import choices
from .limits import drafts_by_choice
from .verify_graphs import capture_lengths, graph, numbers_of_sequences

if TYPE_CHECKING:
    from vllm.config import VllmConfig

LAYOUT_BLOCKS = (4, 8, 16, 32, 64, 128, 256, 512)  # of `prepare_prefill_inputs`, by a batch's longest request


def read_starts(batch: InputBatch) -> np.ndarray:
    """(requests + 1,) int32, where a round's tokens of each request begin and end if it has verified all of its drafts:
    those of the batch and the one that it got. What was verified only the device may know, and the batch's own
    `query_start_loc_np` is then an even share, which a request may exceed."""
    starts = np.zeros(batch.num_reqs + 1, dtype=np.int32)
    np.cumsum(batch.num_scheduled_tokens[: batch.num_reqs] + 1, out=starts[1:])
    return starts


class Drafter(StandaloneARSpeculator):
    """vLLM's speculator for `method: draft_model`, with graphs.

    Args:
        vllm_config: the engine's.
        device: of the draft model.
        verifying: gives the target's graphs. vLLM has just made them when it asks for the drafter's.
    """

    num_speculative_steps: int

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, verifying: Callable[[], CudaGraphManager | None]
    ) -> None:
        super().__init__(vllm_config, device)
        self.verifying = verifying
        # what a graph reads beside the parent's buffers
        self.next_seq_lens = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=device)
        self.last_hidden = torch.zeros(
            self.max_num_reqs, self.hidden_size, dtype=self.draft_model_config.dtype, device=device
        )
        numbers, schedule = [self.num_speculative_steps], self.speculative_config.num_speculative_tokens_per_batch_size
        if drafts_by_choice(vllm_config):
            numbers = choices(self.num_speculative_steps)
        elif schedule is not None:
            numbers = build_dynamic_sd_schedule_lookup(schedule, self.max_num_reqs, self.num_speculative_steps)[1:]
        self.numbers = sorted(set(numbers))  # of drafts that a round may be asked for
        self.sizes: list[int] = []  # requests of graphs
        # two attributes, because vLLM drops the managers that it finds in a speculator's when it has profiled them
        self.reading: CudaGraphManager | None = None
        self.drafting: CudaGraphManager | None = None

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Graphs for as many requests as vLLM captures tokens for, where it captures decode steps whole."""
        full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        able = full and self.dp_size == 1 and self.supports_decode_metadata_update
        mode = CUDAGraphMode.FULL_DECODE_ONLY if able else CUDAGraphMode.NONE
        self.reading, self.drafting = (
            CudaGraphManager(self.vllm_config, self.device, mode, decode_query_len=1) for _ in range(2)
        )
        self.sizes = numbers_of_sequences(self.vllm_config.compilation_config, self.max_num_reqs) if able else []
        room = len(self.expanded_input_ids)
        read = [graph(R, T) for R in self.sizes for T in self._read_lengths if room >= R * T]
        drafted = [graph(R, N) for R in self.sizes for N in self._draft_lengths]
        for graphs, descs in ((self.reading, read), (self.drafting, drafted)):
            descs.sort(key=lambda desc: -desc.num_tokens)
            graphs._capture_descs = {CUDAGraphMode.FULL: descs} if descs else {}
        verifying = self.verifying()
        if verifying is not None and len(self.numbers) > 1:
            capture_lengths(verifying, [drafts + 1 for drafts in self.numbers])

    @property
    def _read_lengths(self) -> list[int]:
        """Most tokens that a round reads of a request, by what it has verified: drafts, the token before them and the
        one that it got."""
        return [drafts + 2 for drafts in self.numbers]

    @property
    def _draft_lengths(self) -> list[int]:
        return [drafts for drafts in self.numbers if drafts]

    def capture(self) -> None:
        for graphs, prepare, name in (
            (self.reading, self._prepare_reading, "Capturing what draft rounds read"),
            (self.drafting, self._prepare_drafting, "Capturing draft rounds"),
        ):
            if graphs is not None and graphs.needs_capture():
                self.idx_mapping.fill_(-1)  # nothing is written to anyone's cache
                self.last_token_indices.zero_()
                graphs.capture(prepare, name)

    def _prepare_reading(self, desc: BatchExecutionDescriptor, warmup: bool) -> Callable[[CUDAGraphMode], None]:
        R, T = desc.num_reqs, desc.uniform_token_count
        self.input_buffers.query_start_loc[: R + 1].copy_(self.arange_gpu[: R + 1] * T)
        self.input_buffers.seq_lens[:R].fill_(T)
        inputs = self._inputs_of_reading(desc, self.arange_np[: R + 1] * T, self._bound(R))
        return lambda _mode: self._read(desc, *inputs)

    def _prepare_drafting(self, desc: BatchExecutionDescriptor, warmup: bool) -> Callable[[CUDAGraphMode], None]:
        R, N = desc.num_reqs, desc.uniform_token_count
        self.input_buffers.query_start_loc[: R + 1].copy_(self.arange_gpu[: R + 1])
        self.input_buffers.seq_lens[:R].fill_(1)
        metadata = self._metadata_of_drafting(desc, R)
        return lambda _mode: self._draft_all(R, N, metadata)

    def warm_up(self) -> None:
        """Compile vLLM's kernel that lays out a round, for requests of all lengths. It fills buffers that every round
        fills anew."""
        for block in LAYOUT_BLOCKS:
            batch = InputBatch.make_dummy(1, min(block - 2, self.max_num_tokens), self.input_buffers)
            self._lay_out(batch, self.next_seq_lens.long(), self.next_seq_lens[:1])

    def _lay_out(self, input_batch: InputBatch, last_sampled: Tensor, num_rejected: Tensor) -> None:
        """The tokens that a round reads, and where each request's begin and end."""
        prepare_prefill_inputs(
            self.input_buffers, input_batch, last_sampled, num_rejected, self.expanded_input_ids,
            self.expanded_positions, self.last_token_indices, self.max_num_reqs, self.max_model_len,
        )  # fmt: skip

    def _bound(self, requests: int) -> Tensor:
        """Upper bound of sequence lengths on the host that holds for every replay."""
        return torch.full((requests,), self.max_model_len, dtype=torch.int32)

    def _inputs_of_reading(
        self, desc: BatchExecutionDescriptor, starts: np.ndarray, bound: Tensor
    ) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
        """Metadata and cache places of the tokens that a round reads.

        Args:
            desc: requests and tokens.
            starts: (requests + 1,) where the host takes the real requests to begin and end. In a graph they are as long
                as they can be, and where each begins and ends stands in query_start_loc on the device.
            bound: (requests,) of the lengths of their sequences.
        """
        R = desc.num_reqs
        places = self.block_tables.compute_slot_mappings(
            self.idx_mapping[:R], self.input_buffers.query_start_loc[: R + 1], self.expanded_positions,
            desc.num_tokens, out=self.expanded_slot_mappings,
        )  # fmt: skip
        metadata = self._build_attn_metadata(
            batch_desc=desc, num_reqs=len(starts) - 1, query_start_loc_np=starts, seq_lens_cpu_upper_bound=bound,
            step=1, slot_mappings=places,
        )  # fmt: skip
        return metadata, build_slot_mappings_by_layer(places, self.kv_cache_config)

    def _metadata_of_drafting(self, desc: BatchExecutionDescriptor, requests: int) -> dict[str, Any] | None:
        """Metadata of forwards over one token of each request, of which so many are real. Builders keep one set of
        buffers: a graph finds in them what was built last, and changes what does not hold for single tokens."""
        R = desc.num_reqs
        single = BatchExecutionDescriptor(cg_mode=CUDAGraphMode.FULL, num_tokens=R, num_reqs=R)
        return self._build_uniform_attn_metadata(
            batch_desc=single, num_reqs=requests, num_query_per_req=1, seq_lens_cpu_upper_bound=self._bound(requests),
            step=2,
        )  # fmt: skip

    def _read(self, desc: BatchExecutionDescriptor, metadata: dict[str, Any] | None, places: dict[str, Tensor]) -> None:
        """The draft model's forward over the tokens that a round reads; what is drafted from is left in `last_hidden`.
        Every tensor stays where it is, for graphs."""
        R, tokens = desc.num_reqs, desc.num_tokens
        hidden = self._run_model(
            self.expanded_input_ids[:tokens], self.expanded_positions[:tokens], metadata, places, None
        )
        last = self.last_token_indices[:R]
        self.input_buffers.positions[:R].copy_(self.expanded_positions[last])
        self.last_hidden[:R].copy_(hidden[last])

    def _draft(self, step: int, hidden: Tensor, positions: Tensor, R: int) -> None:
        self.current_draft_step.fill_(step)
        self.draft_tokens[:R, step] = self.sample_draft(
            hidden, positions, self.idx_mapping[:R], self.temperature, self.seeds, self.current_draft_step,
            self.draft_logits,
        )  # fmt: skip

    def _draft_all(self, R: int, N: int, metadata: dict[str, Any] | None) -> None:
        """N drafts of each request. Every tensor stays where it is, for graphs."""
        buffers = self.input_buffers
        positions, seq_lens, starts = buffers.positions[:R], buffers.seq_lens[:R], buffers.query_start_loc[: R + 1]
        self._draft(0, self.last_hidden[:R], positions, R)
        seq_lens.copy_(self.next_seq_lens[:R])
        starts.copy_(self.arange_gpu[: R + 1])
        for step in range(1, N):
            buffers.input_ids[:R].copy_(self.draft_tokens[:R, step - 1])
            torch.clamp(positions + 1, max=self.max_model_len - 1, out=positions)
            torch.clamp(seq_lens + 1, max=self.max_model_len, out=seq_lens)
            mappings = self.block_tables.compute_slot_mappings(self.idx_mapping[:R], starts, positions, R)
            self._update_draft_decode_metadata(metadata, R)
            by_layer = build_slot_mappings_by_layer(mappings, self.kv_cache_config)
            hidden = self._run_model(buffers.input_ids[:R], positions, metadata, by_layer, None)
            self._draft(step, hidden[:R], positions, R)

    @torch.inference_mode()
    def propose(
        self, input_batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_sampled,
        num_rejected, last_sampled, next_prefill_tokens, temperature, seeds, *args, **kwargs,
    ) -> Tensor:  # fmt: skip
        """Drafts (R, K) for a batch that has just been verified, of which N are made; see vLLM's speculator. A dummy
        round is replayed like others where it can be, because adaptive verification takes its time for theirs."""
        starts, read = read_starts(input_batch), None
        if self.reading is not None and not kwargs.get("skip_attn_for_dummy_run"):
            longest = int(np.diff(starts).max())
            read = self._graph_of(self.reading, input_batch.num_reqs, longest, self._read_lengths)
        if self.dp_size > 1 or (kwargs.get("dummy_run") and read is None):
            return super().propose(
                input_batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_sampled,
                num_rejected, last_sampled, next_prefill_tokens, temperature, seeds, *args, **kwargs,
            )  # fmt: skip
        assert self.reading is not None and self.drafting is not None
        requests, N = input_batch.num_reqs, kwargs.get("num_speculative_tokens")
        N = self.num_speculative_steps if N is None else N
        self._copy_request_inputs(requests, input_batch.idx_mapping, temperature, seeds)
        self._lay_out(input_batch, last_sampled, num_rejected)
        lengths = input_batch.seq_lens[:requests] - num_rejected[:requests].int() + 1
        self.next_seq_lens[:requests] = lengths.clamp(max=self.max_model_len)
        self.next_seq_lens[requests:].zero_()
        if read is not None:
            T = read.uniform_token_count
            self._inputs_of_reading(read, self.arange_np[: requests + 1] * T, self._bound(requests))
            self.reading.run_fullgraph(read)
        else:
            desc = BatchExecutionDescriptor(cg_mode=CUDAGraphMode.NONE, num_tokens=int(starts[-1]), num_reqs=requests)
            self._read(desc, *self._inputs_of_reading(desc, starts, input_batch.seq_lens_cpu_upper_bound))
        if N == 0:  # the draft model has seen all tokens, and may go on at any step
            return self.draft_tokens[:requests]
        draft = self._graph_of(self.drafting, requests, N, self._draft_lengths)
        if draft is None:
            self._draft(0, self.last_hidden[:requests], self.input_buffers.positions[:requests], requests)
            K, self.num_speculative_steps = self.num_speculative_steps, N
            try:
                self._multi_step_decode(input_batch, num_rejected, requests, False, None)
            finally:
                self.num_speculative_steps = K
        else:
            if read is None:
                self._metadata_of_drafting(draft, requests)
            self.drafting.run_fullgraph(draft)
        return self.draft_tokens[:requests]

    def _graph_of(
        self, graphs: CudaGraphManager, requests: int, length: int, lengths: list[int]
    ) -> BatchExecutionDescriptor | None:
        """The smallest graph that holds so many requests of so many tokens, if there is one."""
        size, fitting = bisect_left(self.sizes, requests), bisect_left(lengths, length)
        if size == len(self.sizes) or fitting == len(lengths):
            return None
        desc = graph(self.sizes[size], lengths[fitting])
        return desc if desc in graphs.graphs else None
