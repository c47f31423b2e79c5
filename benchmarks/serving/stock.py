"""What our mixer is compared with inside vLLM: the same Llama with vLLM's own Mamba-2 mixer, one state per query head
and x, B and C for each of them, which is what `MambaMixer2` knows."""

from __future__ import annotations

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFuncCalculator,
    MambaStateDtypeCalculator,
    MambaStateShapeCalculator,
)
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP
from vllm.model_executor.models.utils import extract_layer_index


class StockLayer(nn.Module):
    """A block with MambaMixer2."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        H, P = config.num_attention_heads, config.head_dim
        self.mixer = MambaMixer2(
            hidden_size=config.hidden_size, ssm_state_size=P, conv_kernel_size=4, intermediate_size=H * P,
            use_conv_bias=True, use_bias=False, n_groups=H, num_heads=H, head_dim=P, rms_norm_eps=config.rms_norm_eps,
            activation="silu", model_config=vllm_config.model_config, cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config, prefix=f"{prefix}.mixer",
        )  # fmt: skip
        self.mlp = LlamaMLP(config.hidden_size, config.intermediate_size, "silu", prefix=f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, positions, hidden, residual):
        if residual is None:
            residual, hidden = hidden, self.input_layernorm(hidden)
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden, residual = self.post_attention_layernorm(self.mixer(hidden), residual)
        return self.mlp(hidden), residual


def make_layer(vllm_config: VllmConfig, prefix: str = "") -> nn.Module:
    """The layer that `layer_types` asks for at this place."""
    config = vllm_config.model_config.hf_config
    if config.layer_types[extract_layer_index(prefix)] == "linear_attention":
        return StockLayer(vllm_config, prefix)
    return LlamaDecoderLayer(vllm_config, prefix, config)


class StockHybrid(LlamaForCausalLM, HasInnerState, IsHybrid):
    """The hybrid with MambaMixer2, whose slots have a ring besides with vLLM's ReplaySSM (`use_replayssm`)."""

    supports_replayssm = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=make_layer)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig):
        cache, dtype = vllm_config.cache_config, vllm_config.model_config.dtype
        dtypes = MambaStateDtypeCalculator.mamba2_state_dtype(
            dtype, cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype
        )
        return MambaStateDtypeCalculator.append_replayssm_ring(dtypes, dtype) if cache.use_replayssm else dtypes

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig):
        config = vllm_config.model_config.hf_config
        H, P, cache = config.num_attention_heads, config.head_dim, vllm_config.cache_config
        gpus, drafts = vllm_config.parallel_config.tensor_parallel_size, vllm_config.num_speculative_tokens
        shapes = MambaStateShapeCalculator.mamba2_state_shape(
            gpus, intermediate_size=H * P, n_groups=H, num_heads=H, head_dim=P, state_size=P, conv_kernel=4,
            num_spec=drafts,
        )  # fmt: skip
        if not cache.use_replayssm:
            return shapes
        return MambaStateShapeCalculator.append_replayssm_ring(
            shapes, H, gpus, cache.replayssm_buffer_len, vllm_config.mamba_config.backend, drafts
        )

    @classmethod
    def get_mamba_state_copy_func(cls):
        return MambaStateCopyFuncCalculator.mamba2_state_copy_func()


class StockDraft(LlamaForCausalLM):
    """The Llama that drafts for it. vLLM asks a drafter too whether it knows ReplaySSM; one without states need not."""

    supports_replayssm = True


def register() -> None:
    """vLLM calls this in each of its processes."""
    from vllm.model_executor.models import ModelRegistry

    for name in ("StockHybrid", "StockDraft"):
        ModelRegistry.register_model(name, f"stock:{name}")
