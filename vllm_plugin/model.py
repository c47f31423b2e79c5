"""The hybrid inside vLLM: its Llama, with mixer layers where `layer_types` says so.

Shapes: M tokens of a batch, D model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.mamba.mamba_utils import MambaCopySpec
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import MambaSpec

from mamba_hybrid.config import MIXER, HybridMambaConfig

from .limits import draft_with_mixers, slot_layout
from .mixer import MixerLayer


class KeptAttention(LlamaAttention):
    """Llama's attention with the biases that the configuration names (vLLM gives o_proj that of q, k and v)."""

    def __init__(self, config: HybridMambaConfig, **kwargs: Any) -> None:
        super().__init__(config=config, **(kwargs | {"bias": config.qkv_bias, "bias_o_proj": config.o_bias}))


class MixerDecoderLayer(nn.Module):
    """A block whose token mixing is a mixer."""

    def __init__(self, vllm_config: VllmConfig, config: HybridMambaConfig, prefix: str) -> None:
        super().__init__()
        self.mixer = MixerLayer(vllm_config, config, f"{prefix}.mixer")
        self.mlp = LlamaMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.mlp",
        )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, positions: Tensor, hidden_MD: Tensor, residual_MD: Tensor | None) -> tuple[Tensor, Tensor]:
        """As vLLM's layers: the residual travels beside the hidden states."""
        if residual_MD is None:
            residual_MD, hidden_MD = hidden_MD, self.input_layernorm(hidden_MD)
        else:
            hidden_MD, residual_MD = self.input_layernorm(hidden_MD, residual_MD)
        hidden_MD, residual_MD = self.post_attention_layernorm(self.mixer(positions, hidden_MD), residual_MD)
        return self.mlp(hidden_MD), residual_MD


def make_layer(vllm_config: VllmConfig, prefix: str = "") -> nn.Module:
    """The layer that `layer_types` asks for at this place."""
    config = vllm_config.model_config.hf_config
    if config.layer_types[extract_layer_index(prefix)] == MIXER:
        return MixerDecoderLayer(vllm_config, config, prefix)
    return LlamaDecoderLayer(vllm_config, prefix, config, attn_layer_type=KeptAttention)


def copy_slot(field: Tensor, block_ids: list[int], cur_block_idx: int, num_accepted_tokens: int) -> MambaCopySpec:
    """What prefix caching copies of a slot's field: all of it. A slot is addressed by position, so that it is a
    valid snapshot wherever the sequence stands; num_accepted_tokens is 1, there is no speculation then."""
    source = field[block_ids[cur_block_idx]]
    return MambaCopySpec(start_addr=source.data_ptr(), num_elements=source.numel())


def in_dtype(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Checkpoint tensors as the engine's parameters hold them, which vLLM's loader would cast with a warning for each.

    Args:
        weights: by their names in the checkpoint.
        dtype: the engine's; weights and biases in another float type are cast to it. The mixers' cores stay, which are
            fp32 in the engine, and what belongs to a quantised weight.
    """
    floats = (torch.float32, torch.bfloat16, torch.float16)
    for name, tensor in weights:
        plain = type(tensor) is Tensor and tensor.dtype in floats and name.endswith((".weight", ".bias"))
        yield name, tensor.to(dtype) if plain and ".core." not in name else tensor


class HybridMambaForCausalLM(LlamaForCausalLM, HasInnerState, IsHybrid):
    """The hybrid as vLLM loads it; parameter names are the checkpoint's."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=make_layer)  # type: ignore[arg-type]
        self.dtype = vllm_config.model_config.dtype
        if vllm_config.lora_config is not None:
            from .punica import choose_punica

            choose_punica()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """As vLLM's Llama, without its warnings about a checkpoint in another float type."""
        return super().load_weights(in_dtype(weights, self.dtype))

    def process_weights_after_loading(self) -> None:
        """vLLM calls this when the weights are there, and again when they are replaced."""
        for module in self.modules():
            if isinstance(module, MixerLayer):
                module.A_S.copy_(module.core.A_S)

    @classmethod
    def get_model_state_cls(cls) -> type:
        """What Model Runner V2 keeps of a batch between steps."""
        from .snapshots import SnapshotState  # V2's modules need Triton, which V1 on a CPU does without

        return SnapshotState

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        """Shapes of a slot's fields, as the layers give them."""
        return cls.get_mamba_specs_from_config(vllm_config)[0].shapes

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """Their dtypes."""
        return cls.get_mamba_specs_from_config(vllm_config)[0].dtypes

    @classmethod
    def get_mamba_specs_from_config(cls, vllm_config: VllmConfig) -> list[MambaSpec]:
        """Slots of the model and of its draft model: a page of vLLM's cache must hold the larger."""
        draft = draft_with_mixers(vllm_config)
        layouts = [slot_layout(vllm_config), *([slot_layout(vllm_config, draft)] if draft else [])]
        fields = [layout.fields().values() for layout in layouts]
        return [
            MambaSpec(shapes=tuple(s for s, _ in field), dtypes=tuple(d for _, d in field), block_size=-1)
            for field in fields
        ]

    def get_mamba_state_copy_funcs(self, mamba_types: set) -> dict:
        """`copy_slot` for each field of a slot."""
        fields = self.config.slot_layout().fields()
        return dict.fromkeys(mamba_types, (copy_slot,) * len(fields))
