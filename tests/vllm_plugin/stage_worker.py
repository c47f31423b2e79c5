"""vLLM's CPU worker for eager pipeline stages. vLLM 0.32 makes the buffers between two stages while it warms up, which
its CPU worker leaves out where nothing is compiled."""

from __future__ import annotations

from vllm.distributed import get_pp_group
from vllm.v1.worker.cpu_worker import CPUWorker


class StageWorker(CPUWorker):
    """The worker."""

    def compile_or_warm_up_model(self):
        runner = self.model_runner
        if not get_pp_group().is_first_rank:
            runner.intermediate_tensors = runner.get_model().make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
        return super().compile_or_warm_up_model()
