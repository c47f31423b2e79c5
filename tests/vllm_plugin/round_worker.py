"""vLLM's CPU worker with our `Drafter`, whose rounds run one operation after another where a GPU replays a graph."""

from __future__ import annotations

from collections.abc import Callable

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from vllm_plugin.drafter import Drafter

PADDED = 4  # a graph's requests are a multiple of this


class All:
    """Holds everything."""

    def __contains__(self, desc: BatchExecutionDescriptor) -> bool:
        return True


class Rounds:
    """In the place of a manager of CUDA graphs."""

    graphs = All()

    def __init__(self, run: Callable[[BatchExecutionDescriptor], None]) -> None:
        self.run_fullgraph = run


class EagerDrafter(Drafter):
    """`Drafter` without graphs; vLLM's CPU attention makes its metadata anew for each token."""

    rounds = ragged = 0
    requests = 0
    padded = PADDED

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        self.sizes = list(range(self.padded, self.max_num_reqs + self.padded, self.padded)) if self.padded else []
        self.reading = Rounds(self._run_reading)  # type: ignore[assignment]
        self.drafting = Rounds(self._run_drafting)  # type: ignore[assignment]

    def _run_reading(self, desc: BatchExecutionDescriptor) -> None:
        self._read(
            desc, *self._inputs_of_reading(desc, self.arange_np[: self.requests + 1], self._bound(self.requests))
        )
        self.ragged += int((self.starts_np[1:] - self.starts_np[:-1]).min() < desc.uniform_token_count)
        print(f"read up to {desc.uniform_token_count} tokens of {self.requests} requests", flush=True)

    def _run_drafting(self, desc: BatchExecutionDescriptor) -> None:
        R, N = desc.num_reqs, desc.uniform_token_count
        builders = [group.get_metadata_builder() for groups in self.attn_groups for group in groups]
        kept = [(builder.slot_R, builder.slot_R.clone()) for builder in builders if hasattr(builder, "slot_R")]
        single = self.single(R)
        for slot_R, before in kept:  # a graph finds in its buffers what was built before it, and does not build
            slot_R.copy_(before)
        self._draft_all(R, N, single)
        self.rounds += 1
        print(
            f"round {self.rounds}: {N} drafts of {self.requests} requests, {R} with padding, "
            f"{self.ragged} ragged so far", flush=True,
        )  # fmt: skip

    def _multi_step_decode(self, *args):
        print(f"round: {self.num_speculative_steps} drafts of {self.requests} requests without a graph", flush=True)
        super()._multi_step_decode(*args)

    def capture(self) -> None:
        """Nothing to capture."""

    def propose(self, input_batch, *args, **kwargs):
        n = self.requests = input_batch.num_reqs
        self.starts_np = input_batch.query_start_loc_np[: n + 1] + self.arange_np[: n + 1]
        if kwargs.get("num_speculative_tokens") == 0:
            print(f"round: 0 drafts of {n} requests", flush=True)
        return super().propose(input_batch, *args, **kwargs)

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
            runner.speculator = EagerDrafter(self.vllm_config, runner.device, lambda: None)

    def compile_or_warm_up_model(self):
        self.model_runner.speculator.warm_up()
        return super().compile_or_warm_up_model()


class AfterADummyStep(RoundWorker):
    """The worker after a step such as vLLM times for adaptive verification."""

    def compile_or_warm_up_model(self):
        import slot_watch  # what imports it is watched

        result = super().compile_or_warm_up_model()
        print("dummy step", flush=True)
        self.model_runner._dummy_run(self.model_runner.max_num_reqs, context_len=300)
        slot_watch.replayed.clear()  # the plugin does not count it
        slot_watch.flushes.clear()
        return result


class WithoutGraphs(RoundWorker):
    """The worker where no graph was captured."""

    def init_device(self) -> None:
        super().init_device()
        self.model_runner.speculator.padded = 0
