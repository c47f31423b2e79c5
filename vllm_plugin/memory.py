"""What a sequence takes of the engine's memory, in a line for the log."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

from mamba_hybrid.config import MIXER

from .limits import slot_layout

if TYPE_CHECKING:
    from vllm.config import VllmConfig

FP8_BYTES = 1


def memory_line(vllm_config: VllmConfig, group: int) -> str:
    """State and KV cache of a sequence on one device, and how many sequences of the longest kind fit.

    Args:
        vllm_config: the engine's, with the number of its blocks.
        group: layers of a cache group on this device; vLLM makes groups of one size, which share each block's memory.
    """
    config, cache = vllm_config.model_config.hf_config, vllm_config.cache_config
    layout = slot_layout(vllm_config)
    kinds = config.layer_types[
        slice(*vllm_config.model_config.get_layers_start_end_indices(vllm_config.parallel_config))
    ]
    mixers = kinds.count(MIXER)
    attention = len(kinds) - mixers
    width = FP8_BYTES if cache.cache_dtype.startswith("fp8") else vllm_config.model_config.dtype.itemsize
    token = 2 * attention * layout.groups * config.head_dim * width
    tokens = vllm_config.model_config.max_model_len
    blocks = ceil(attention / group) * ceil(tokens / cache.block_size) + ceil(mixers / group)
    return (
        f"A sequence keeps {mixers * layout.bytes() / 2**20:.2f} MiB of state ({mixers} mixer layers, whatever its "
        f"length) and {token / 2**10:.1f} KiB of KV cache a token ({attention} attention layers); "
        f"{cache.num_gpu_blocks // blocks} sequences of {tokens} tokens fit into {cache.num_gpu_blocks} blocks."
    )
