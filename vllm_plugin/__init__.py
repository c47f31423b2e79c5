"""vLLM plugin for hybrids: `vllm serve DIR` and `vllm.LLM(DIR)` find it through the entry point `vllm.general_plugins`.

Importing this package imports neither vLLM nor torch.
"""

from __future__ import annotations

ARCHITECTURE = "HybridMambaForCausalLM"


def register() -> None:
    """Make vLLM know hybrids. vLLM calls this in each of its processes, sometimes twice.

    With a vLLM that the plugin is not made for, one line is logged, and loading a hybrid raises it; other models
    are left alone.
    """
    from .version import refusal

    line = refusal()
    if line is not None:
        from .refused import refuse

        refuse(line)
        return

    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

    import mamba_hybrid  # noqa: F401  (registers the configuration with transformers)

    from .limits import Limits

    ModelRegistry.register_model(ARCHITECTURE, f"vllm_plugin.model:{ARCHITECTURE}")
    # vLLM's hook for what a model asks of the engine's configuration, looked up by architecture
    MODELS_CONFIG_MAP[ARCHITECTURE] = Limits
    if not hasattr(MambaAttentionBackendEnum, "HYBRID_MIXER"):
        MambaAttentionBackendEnum.register("HYBRID_MIXER", "vllm_plugin.backend.MixerBackend")
