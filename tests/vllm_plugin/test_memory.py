"""The line about memory."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from mamba_hybrid import HybridMambaConfig
from vllm_plugin.memory import memory_line


def test_line_of_an_8b():
    config = HybridMambaConfig(
        num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        layer_types=["linear_attention", "full_attention"] * 16, state_heads=8,
    )  # fmt: skip
    engine = SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=config, dtype=torch.bfloat16, max_model_len=4096, get_layers_start_end_indices=lambda _: (0, 32)
        ),
        cache_config=SimpleNamespace(
            cache_dtype="auto", mamba_ssm_cache_dtype="float32", block_size=256, num_gpu_blocks=1000
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        num_speculative_tokens=0,
    )
    # 8 states of 64 KiB, a ring of 80 rows of x, B (8 heads of 128 in bf16) and dt, positions: 16 times
    assert memory_line(engine, 16) == (
        "A sequence keeps 13.04 MiB of state (16 mixer layers, whatever its length) and 64.0 KiB of KV cache a token "
        "(16 attention layers); 58 sequences of 4096 tokens fit into 1000 blocks."
    )
    engine.parallel_config.tensor_parallel_size = 2
    assert "6.52 MiB of state" in memory_line(engine, 16) and "32.0 KiB of KV cache" in memory_line(engine, 16)
    engine.model_config.get_layers_start_end_indices = lambda _: (0, 16)  # the first of two pipeline stages
    assert "3.26 MiB of state (8 mixer layers" in memory_line(engine, 8)
    assert "58 sequences of 4096 tokens" in memory_line(engine, 8)
