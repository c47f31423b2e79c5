"""vLLM's CPU worker with our `Drafter`, whose rounds run one operation after another where a GPU replays a graph."""

from __future__ import annotations

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from vllm_plugin.drafter import Drafter

PADDED = 4  # a graph's requests are a multiple of this


class Rounds:
    """In the place of a manager of CUDA graphs."""

    def __init__(self, drafter: EagerDrafter) -> None:
        self.drafter = drafter

    def dispatch(self, requests: int, tokens: int, uniform: int, loras: int) -> BatchExecutionDescriptor:
        R = -(-requests // PADDED) * PADDED
        return BatchExecutionDescriptor(
            cg_mode=CUDAGraphMode.FULL, num_tokens=R, num_reqs=R, uniform_token_count=uniform
        )

    def run_fullgraph(self, desc: BatchExecutionDescriptor) -> None:
        drafter = self.drafter
        single = drafter.single(desc.num_reqs)
        drafter._round(desc.num_reqs, drafter._first_metadata(desc, drafter.requests), single)
        drafter.rounds += 1
        drafter.ragged += int((drafter.starts_np[1:] - drafter.starts_np[:-1]).min() < drafter.first_tokens)
        print(
            f"round {drafter.rounds} of {drafter.requests} requests, {desc.num_reqs} with padding, "
            f"{drafter.ragged} ragged so far", flush=True,
        )  # fmt: skip


class EagerDrafter(Drafter):
    """`Drafter` without graphs; vLLM's CPU attention makes its metadata anew for each token."""

    rounds = ragged = 0
    requests = 0

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        self.graphs = Rounds(self)  # type: ignore[assignment]

    def capture(self) -> None:
        """Nothing to capture."""

    def propose(self, input_batch, *args, **kwargs):
        n = input_batch.num_reqs
        self.starts_np = input_batch.query_start_loc_np[: n + 1] + self.arange_np[: n + 1]
        return super().propose(input_batch, *args, **kwargs)

    def _first_metadata(self, desc, requests):
        self.requests = requests
        return super()._first_metadata(desc, requests)

    def _build_attn_metadata(self, *, query_start_loc_np, step, **kwargs):
        # vLLM's CPU attention plans by the host's numbers, so they are exact here
        starts = self.starts_np if step == 1 else query_start_loc_np
        return super()._build_attn_metadata(query_start_loc_np=starts, step=step, **kwargs)

    def single(self, R: int):
        desc = BatchExecutionDescriptor(cg_mode=CUDAGraphMode.FULL, num_tokens=R, num_reqs=R)
        return self._build_uniform_attn_metadata(
            batch_desc=desc, num_reqs=R, num_query_per_req=1, seq_lens_cpu_upper_bound=self._bound(R), step=2
        )

    def _update_draft_decode_metadata(self, metadata, R: int) -> None:
        slots = {name: rows.slot_R.clone() for name, rows in metadata.items() if hasattr(rows, "slot_R")}
        metadata.update(self.single(R))
        for name, slot_R in slots.items():  # a graph refreshes everything but these
            metadata[name].slot_R.copy_(slot_R)


class RoundWorker(CPUWorker):
    """The worker."""

    def init_device(self) -> None:
        super().init_device()
        runner = self.model_runner
        if runner.speculator is not None:
            runner.speculator = EagerDrafter(self.vllm_config, runner.device)

    def compile_or_warm_up_model(self):
        self.model_runner.speculator.warm_up()
        return super().compile_or_warm_up_model()
