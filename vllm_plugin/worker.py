"""The worker that speculates with draft models: vLLM's own, with our `Drafter`."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker


class SpeculativeWorker(Worker):
    """vLLM's GPU worker. The plugin chooses it where a hybrid is speculated for by a draft model on Model Runner V2;
    `--worker-cls vllm_plugin.worker.SpeculativeWorker` does so for any target."""

    def _make_model_runner(self):
        runner = super()._make_model_runner()
        speculative = self.vllm_config.speculative_config
        if self.use_v2_model_runner and speculative is not None and speculative.uses_draft_model():
            from .drafter import Drafter

            if runner.speculator is not None:
                runner.speculator = Drafter(self.vllm_config, self.device)
        return runner
