"""What a sequence takes of the engine's memory, in a line for the log."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config
from vllm.v1.kv_cache_interface import KVCacheConfig, MambaSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def state_bytes(kv_cache_config: KVCacheConfig) -> int:
    """Bytes of a sequence's slots on one device, in the mixers of the model and of its draft model."""
    return sum(
        len(group.layer_names) * group.kv_cache_spec.state_content_size_bytes
        for group in kv_cache_config.kv_cache_groups
        if isinstance(group.kv_cache_spec, MambaSpec)
    )


def memory_line(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str:
    """State and KV cache of a sequence on one device, and how many sequences of the longest kind fit.

    Args:
        vllm_config: the engine's.
        kv_cache_config: what vLLM has made of its memory; with pipeline stages the first one's.
    """
    mixers = attention = token = 0
    for group in kv_cache_config.kv_cache_groups:
        spec, layers = group.kv_cache_spec, len(group.layer_names)
        if isinstance(spec, MambaSpec):
            mixers += layers
        else:
            attention += layers
            token += layers * spec.page_size_bytes // spec.block_size
    fit, state = get_max_concurrency_for_kv_cache_config(vllm_config, kv_cache_config), state_bytes(kv_cache_config)
    return (
        f"A sequence keeps {state / 2**20:.2f} MiB of state ({mixers} mixer layers, whatever its "
        f"length) and {token / 2**10:.1f} KiB of KV cache a token ({attention} attention layers); {int(fit)} sequences "
        f"of {vllm_config.model_config.max_model_len} tokens fit into {kv_cache_config.num_blocks} blocks."
    )
