"""The mixer layer inside vLLM: the engine's linear layers around the `MixerCore` that transformers runs too.

Shapes: M tokens of the batch, padding included, D model width; on one device H query heads, G key/value heads, S state
heads, P head width, N state width, X what the mixer's op reads side by side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import vllm.model_executor.layers.mamba.mamba_mixer2  # noqa: F401  (defines the custom op below)
from mamba_hybrid_kernels import SlotTensors, StepRows, readout, replay, short_conv_step
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID
from vllm.v1.kv_cache_interface import MambaSpec

from mamba_hybrid.config import HybridMambaConfig
from mamba_hybrid.mixer import MixerCore

from .limits import slot_layout
from .qkv import qkv_projection

LONG_PROMPT = 4096  # of a warm-up: so long that its state walk is cut into pieces, if any is (`prefill`)


class MixerLayer(nn.Module, MambaBase):
    """A mixer whose slots are blocks of vLLM's cache, one a sequence. With several devices each has whole KV groups.

    Args:
        vllm_config: the engine's.
        config: the model's.
        prefix: the layer's name, `model.layers.3.mixer`; a draft model's begins with `draft_model`.
    """

    def __init__(self, vllm_config: VllmConfig, config: HybridMambaConfig, prefix: str) -> None:
        super().__init__()
        D, H, P, N = config.hidden_size, config.num_attention_heads, config.head_dim, config.state_size
        quant = vllm_config.quant_config
        self.prefix = prefix
        self.qkv_proj = qkv_projection(config, quant, f"{prefix}.qkv_proj")
        self.z_proj = None
        if config.gate != "none":
            self.z_proj = ColumnParallelLinear(D, H * P, bias=False, quant_config=quant, prefix=f"{prefix}.z_proj")
        # a handful of rows that set the decay: not worth the error of quantising them
        self.dt_proj = ColumnParallelLinear(D, config.state_heads, bias=False, prefix=f"{prefix}.dt_proj")
        self.o_proj = RowParallelLinear(H * P, D, bias=config.o_bias, quant_config=quant, prefix=f"{prefix}.o_proj")
        self.config = config.shard(get_tensor_model_parallel_world_size())
        self.core = MixerCore(self.config).float()
        for name, parameter in self.core.named_parameters():
            parameter.weight_loader = self._loader(name)  # type: ignore[attr-defined]
        self.A_S: Tensor  # of the weights as loaded
        self.register_buffer("A_S", self.core.A_S.detach(), persistent=False)
        self.rotary_emb: nn.Module | None = None
        if config.ssm_rope:
            self.rotary_emb = get_rope(N, config.max_position_embeddings, rope_parameters=config.rope_parameters)
        self.most_rows = vllm_config.scheduler_config.max_num_seqs
        self.layout = slot_layout(vllm_config)
        H, G, S = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.state_heads
        dtype = vllm_config.model_config.dtype
        self.qkv_widths = [H * N, G * N, G * P]
        # dt is fp32 whatever the others are, so its bits travel as that many of theirs
        self.widths = [*self.qkv_widths, S * 4 // dtype.itemsize, H * P if self.z_proj is not None else 0]
        self.kv_cache: tuple[Tensor, ...] = tuple(torch.empty(0) for _ in self.layout.fields())
        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"two layers are named {prefix}")
        layers[prefix] = self

    def _loader(self, name: str) -> Callable[[Tensor, Tensor], None]:
        """Loads this device's part of a parameter of the core."""
        rank, devices = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        G, P, N = self.config.num_key_value_heads, self.config.head_dim, self.config.state_size
        # the convolution's channels are x, B and C side by side, each cut by head; the others are heads only
        parts = [G * P, G * N, self.config.num_attention_heads * N] if name in ("conv_weight", "conv_bias") else None

        def load(parameter: Tensor, loaded: Tensor) -> None:
            if name == "conv_silu":
                mine = loaded
            elif parts is None:
                mine = loaded.chunk(devices)[rank]
            else:
                whole = loaded.split([width * devices for width in parts])
                mine = torch.cat([part.chunk(devices)[rank] for part in whole])
            if mine.shape != parameter.shape:
                raise ValueError(f"{self.prefix}.core.{name} of shape {tuple(loaded.shape)} does not fit the model")
            parameter.data.copy_(mine)

        return load

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

    def forward(self, positions_M: Tensor, hidden_MD: Tensor) -> Tensor:
        """(M, D) -> (M, D). What is element by element stands here, where the engine's compiler fuses it."""
        q, k, v = self.qkv_proj(hidden_MD)[0].split(self.qkv_widths, -1)
        if self.rotary_emb is not None and not self.config.short_conv:
            q, k = self.rotary_emb(positions_M, q, k)
        dt_MS = self.core.step_size(self.dt_proj(hidden_MD)[0])
        parts = [q, k, v, dt_MS.view(hidden_MD.dtype)]
        if self.z_proj is not None:
            parts.append(self.z_proj(hidden_MD)[0])
        out = hidden_MD.new_empty(len(hidden_MD), self.o_proj.input_size_per_partition)
        # vLLM's own op: it cuts the compiled graph here, finds this layer by name and calls conv_ssm_forward
        torch.ops.vllm.mamba_mixer2(torch.cat(parts, -1), out, _encode_layer_name(self.prefix))
        return self.o_proj(out)[0]

    def conv_ssm_forward(self, projected_states: Tensor, output: Tensor) -> None:
        """What needs the slots of this batch.

        Args:
            projected_states: (M, X), q | k | v | dt | z, q and k rotated where nothing else comes before that.
            output: (M, H P), written; padding becomes 0.
        """
        metadata = get_forward_context().attn_metadata
        rows = None if metadata is None else metadata.get(self.prefix)
        if rows is None:  # a run that only measures memory, or tunes attention: there are no slots
            output.zero_()
            if metadata is None and output.is_cuda:
                self._take_memory(output)
            return
        self.mix(projected_states, rows, output)

    def _take_memory(self, output: Tensor) -> None:
        """As much as a step of so many tokens takes at most, so that vLLM sees it."""
        from mamba_hybrid_kernels.prefill import most_workspace  # Triton is needed to run, not to import

        near_and_far = 2 * output.nbytes
        output.new_empty(near_and_far + most_workspace(self.layout, self.most_rows, len(output)), dtype=torch.uint8)

    def mix(self, projected_MX: Tensor, rows: StepRows, output: Tensor) -> None:
        """The same with the rows given."""
        slots = SlotTensors(**dict(zip(self.layout.fields(), self.kv_cache, strict=True)))
        q, k, v, dt, z = projected_MX.split(self.widths, -1)

        def conv(raw: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return short_conv_step(slots, self.layout, rows, raw, weight, bias)

        x, b, c = self.core.split(q, k, v, conv)
        if self.config.short_conv and self.rotary_emb is not None:
            # padding may stand anywhere, the rotary table ends somewhere
            positions_M = rows.positions(len(q)).clamp(0, self.config.max_position_embeddings - 1)
            c, b = (t.unflatten(-1, (-1, self.config.state_size)) for t in self.rotary_emb(
                positions_M, c.flatten(-2), b.flatten(-2)
            ))  # fmt: skip
        near, far = replay(slots, self.layout, rows, x, dt.view(torch.float32), self.A_S, b, c, self.core.D)
        near_weight = self.core.near_weight if self.config.window else None
        readout(
            near, far, z if self.z_proj is not None else None, near_weight, self.core.far_weight,
            gate=self.config.gate, norm=self.config.norm, eps=self.config.rms_norm_eps, live=rows.live, out=output,
        )  # fmt: skip

    def warm_up(self, most_rows: int, most_tokens: int) -> None:
        """Compile the kernels for prompts, short ones and long ones, of so many rows and tokens in a step at most: the
        fewest rows of each size of the kernels' table. They write to the block that vLLM gives to no sequence."""
        from mamba_hybrid_kernels.prefill import row_block  # Triton is needed to run, not to import

        short, rows = self.layout.step + 1, 1
        while rows <= min(most_rows, most_tokens // short):
            for last in sorted({short, min(LONG_PROMPT, most_tokens - short * (rows - 1))}):
                lengths = [short] * (rows - 1) + [last]
                step = StepRows.of([NULL_BLOCK_ID] * rows, [0] * rows, lengths, self.A_S.device)
                projected_MX = self.A_S.new_zeros(sum(lengths), sum(self.widths), dtype=self.layout.dtype)
                out_MX = projected_MX.new_empty(sum(lengths), self.o_proj.input_size_per_partition)
                self.mix(projected_MX, step, out_MX)
            rows = row_block(rows) + 1
