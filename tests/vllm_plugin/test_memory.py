"""The line about memory."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from mamba_hybrid_kernels import SlotLayout
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec

from vllm_plugin.memory import memory_line


def test_line_of_an_8b():
    layout = SlotLayout(8, 8, 32, 128, 128, 64, dtype=torch.bfloat16)
    fields = layout.fields().values()
    mixer = MambaSpec(
        shapes=tuple(shape for shape, _ in fields), dtypes=tuple(dtype for _, dtype in fields), block_size=256
    )
    attention = FullAttentionSpec(block_size=256, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
    names = [f"model.layers.{i}" for i in range(32)]
    groups = [KVCacheGroupSpec(names[::2], mixer), KVCacheGroupSpec(names[1::2], attention)]
    engine = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=4096),
        cache_config=SimpleNamespace(mamba_cache_mode="none"),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
    )
    blocks = KVCacheConfig(num_blocks=1000, kv_cache_tensors=[], kv_cache_groups=groups)
    # 8 states of 64 KiB, a ring of 80 rows of x, B (8 heads of 128 in bf16) and dt, positions: 16 times
    assert memory_line(engine, blocks) == (
        "A sequence keeps 13.04 MiB of state (16 mixer layers, whatever its length) and 64.0 KiB of KV cache a token "
        "(16 attention layers); 58 sequences of 4096 tokens fit into 1000 blocks."
    )
    # two draft layers of the same kinds, in groups that vLLM makes no larger than the others
    drafter = [KVCacheGroupSpec(["draft_model.layers.0"], mixer), KVCacheGroupSpec(["draft_model.layers.1"], attention)]
    blocks = KVCacheConfig(num_blocks=1000, kv_cache_tensors=[], kv_cache_groups=[*groups, *drafter])
    line = memory_line(engine, blocks)
    assert "17 mixer layers" in line and "68.0 KiB of KV cache" in line and "29 sequences of 4096 tokens" in line
