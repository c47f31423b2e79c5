"""The GPU worker of hybrids: vLLM's own, which is warm when it starts to serve, and drafts by our `Drafter`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.worker.gpu_worker import Worker

from .mixer import MixerLayer

if TYPE_CHECKING:
    from .drafter import Drafter


class HybridWorker(Worker):
    """vLLM's GPU worker, which the plugin chooses for hybrids where the user names no other. On Model Runner V2 it
    runs draft models in CUDA graphs, whatever the target: `--worker-cls vllm_plugin.worker.HybridWorker`."""

    drafter: Drafter | None = None

    def _make_model_runner(self):
        runner = super()._make_model_runner()
        speculative = self.vllm_config.speculative_config
        if self.use_v2_model_runner and speculative is not None and speculative.uses_draft_model():
            from .drafter import Drafter

            if runner.speculator is not None:
                self.drafter = Drafter(self.vllm_config, self.device, lambda: runner.cudagraph_manager)
                runner.speculator = self.drafter
        return runner

    def compile_or_warm_up_model(self):
        """Compile the mixers' kernels for prompts too, and the drafter's; vLLM's own warm-up asks for none that is long
        enough."""
        if self.vllm_config.kernel_config.enable_jit_warmup:
            layers = self.vllm_config.compilation_config.static_forward_context.values()
            limits = self.vllm_config.scheduler_config
            # the target's layers are alike, and so are the draft model's
            for layer in {layer.layout: layer for layer in layers if isinstance(layer, MixerLayer)}.values():
                layer.warm_up(limits.max_num_seqs, limits.max_num_batched_tokens)
            if self.drafter is not None:
                self.drafter.warm_up()
        return super().compile_or_warm_up_model()
