"""The mixer's projections to queries, keys and values as one product."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear

from mamba_hybrid.config import HybridMambaConfig


class UnevenQKV(MergedColumnParallelLinear):
    """q, k and v where v's heads are of another width than k's, for which vLLM's own class has no LoRA."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[str]:
        """As the parent's, with the parts named as vLLM's own class names them."""

        def numbered():
            for name, tensor in weights:
                tensor.shard_id = "qkv".index(tensor.shard_id)  # type: ignore[attr-defined]
                yield name, tensor

        return super().load_weights(numbered())


def qkv_projection(config: HybridMambaConfig, quant_config: Any, prefix: str) -> ColumnParallelLinear:
    """The layer, with the heads of this device.

    Args:
        config: the whole model's.
        quant_config: the engine's.
        prefix: the layer's name.
    """
    D, H, G = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    P, N = config.head_dim, config.state_size
    rest = {"bias": config.qkv_bias, "quant_config": quant_config, "prefix": prefix}
    if N == P:
        return QKVParallelLinear(D, P, H, G, **rest)
    return UnevenQKV(D, [H * N, G * N, G * P], **rest)
