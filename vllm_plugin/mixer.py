"""The mixer layer inside vLLM: the engine's linear layers around the `MixerCore` that transformers runs too.

Shapes: M tokens of the batch (the live ones inside `conv_ssm_forward`), D model width, H query heads, G key/value
heads, S state heads, P head width, N state width, X the projections side by side.
"""

from __future__ import annotations

import torch
import vllm.model_executor.layers.mamba.mamba_mixer2  # noqa: F401  (defines the custom op below)
from mamba_hybrid_kernels import SlotTensors
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import QKVParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import MambaSpec

from mamba_hybrid.config import HybridMambaConfig
from mamba_hybrid.mixer import MixerCore

from .limits import slot_layout


class MixerLayer(nn.Module, MambaBase):
    """A mixer whose slots are blocks of vLLM's cache, one a sequence.

    Args:
        vllm_config: the engine's.
        config: the model's.
        prefix: the layer's name, `model.layers.3.mixer`; a draft model's begins with `draft_model`.
    """

    def __init__(self, vllm_config: VllmConfig, config: HybridMambaConfig, prefix: str) -> None:
        super().__init__()
        D, H, P, S = config.hidden_size, config.num_attention_heads, config.head_dim, config.state_heads
        quant = vllm_config.quant_config
        self.prefix = prefix
        self.qkv_proj = QKVParallelLinear(
            D,
            config.state_size,
            H,
            config.num_key_value_heads,
            bias=config.qkv_bias,
            quant_config=quant,
            prefix=f"{prefix}.qkv_proj",
            v_head_size=P,
        )
        self.z_proj = None
        if config.gate != "none":
            self.z_proj = ReplicatedLinear(D, H * P, bias=False, quant_config=quant, prefix=f"{prefix}.z_proj")
        # a handful of rows that set the decay: not worth the error of quantising them
        self.dt_proj = ReplicatedLinear(D, S, bias=False, prefix=f"{prefix}.dt_proj")
        self.o_proj = RowParallelLinear(H * P, D, bias=config.o_bias, quant_config=quant, prefix=f"{prefix}.o_proj")
        self.core = MixerCore(config).float()
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.layout = slot_layout(vllm_config, draft=prefix.startswith("draft_model"))
        self.widths = [H * config.state_size, config.num_key_value_heads * config.state_size]
        self.widths += [config.num_key_value_heads * P, S, H * P if self.z_proj is not None else 0]
        self.kv_cache: tuple[Tensor, ...] = tuple(torch.empty(0) for _ in self.layout.fields())
        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"two layers are named {prefix}")
        layers[prefix] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.HYBRID_MIXER  # type: ignore[attr-defined]  # added by register()

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return tuple(shape for shape, _ in self.layout.fields().values())

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return tuple(dtype for _, dtype in self.layout.fields().values())

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> MambaSpec:
        """One block a sequence, with speculation too: a slot holds no drafted token's state."""
        cache = vllm_config.cache_config
        return MambaSpec(
            shapes=self.get_state_shape(),
            dtypes=self.get_state_dtype(),
            block_size=cache.mamba_block_size,
            page_size_padded=cache.mamba_page_size_padded,
            mamba_type=self.mamba_type,
            mamba_cache_mode=cache.mamba_cache_mode,
            num_speculative_blocks=0,
        )

    def forward(self, hidden_MD: Tensor) -> Tensor:
        """(M, D) -> (M, D)."""
        parts = [self.qkv_proj(hidden_MD)[0], self.dt_proj(hidden_MD)[0]]
        if self.z_proj is not None:
            parts.append(self.z_proj(hidden_MD)[0])
        out = hidden_MD.new_empty(len(hidden_MD), self.o_proj.input_size)
        # vLLM's own op: it cuts the compiled graph here, finds this layer by name and calls conv_ssm_forward
        torch.ops.vllm.mamba_mixer2(torch.cat(parts, -1), out, _encode_layer_name(self.prefix))
        return self.o_proj(out)[0]

    def conv_ssm_forward(self, projected_states: Tensor, output: Tensor) -> None:
        """Everything between the projections, with the slots of this batch.

        Args:
            projected_states: (M, X), q | k | v | dt | z.
            output: (M, H P), written.
        """
        output.zero_()  # rows that are padding
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # a run that only measures memory: there are no slots yet
            return
        rows = metadata[self.prefix]
        if not rows.lengths:
            return
        q, k, v, dt, z = projected_states[rows.tokens_M].split(self.widths, -1)
        cos, sin = self.rotary_emb(q.float(), rows.positions_M[None])
        slots = SlotTensors(**dict(zip(self.layout.fields(), self.kv_cache, strict=True)))
        output[rows.tokens_M] = self.core.step(
            q,
            k,
            v,
            dt,
            z if self.z_proj is not None else None,
            cos[0],
            sin[0],
            slots,
            self.layout,
            rows.slot_ids,
            rows.starts,
            rows.lengths,
        ).to(output.dtype)
