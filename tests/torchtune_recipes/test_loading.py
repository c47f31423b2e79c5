"""Weights read straight into shards, against the model loaded whole."""

import ctypes
import gc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig

from mamba_hybrid import HybridMambaForCausalLM
from mamba_hybrid.checkpoint import load_model, open_model, save_model
from mamba_hybrid.source import hybrid_config
from tests.tiny import tokenizer
from torchtune_recipes.loading import fill
from torchtune_recipes.models import Student, Teacher, shard


def shards(path, rank, world, dtype, masters):
    """What one of several processes holds, without the others: name -> rows."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        model, source = open_model(path, dtype)
        module = Student(model) if masters else Teacher(model)
        shard(module, init_device_mesh("cpu", (world,)), dtype, masters=masters)
        fill(module, source, torch.device("cpu"))
        head, embeddings = module.model.lm_head.weight, module.model.model.embed_tokens.weight
        assert (head is embeddings) == model.config.tie_word_embeddings
        buffers = dict(module.model.named_buffers())
        # nothing shards a frozen model for one process
        assert isinstance(head, DTensor) == (world > 1)
        held = {name: p.detach() for name, p in module.model.named_parameters()}
        return {name: p.to_local() if isinstance(p, DTensor) else p for name, p in held.items()}, buffers
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 3, 5])
@pytest.mark.parametrize(
    ("name", "masters", "dtype"), [("hybrid", True, torch.float32), ("teacher", False, torch.bfloat16)]
)
def test_the_shards_of_all_processes_are_the_model(models, name, masters, dtype, world):
    """Also where rows do not divide by the processes."""
    whole = load_model(models / name, dtype)
    parts = [shards(models / name, rank, world, dtype, masters) for rank in range(world)]
    weights = dict(whole.named_parameters())
    assert set(parts[0][0]) == set(weights) and len(weights) > 20
    for key, weight in weights.items():
        rows = [own[key] for own, _ in parts]
        assert max(map(len, rows)) == -(-len(weight) // world), key
        assert torch.equal(torch.cat(rows), weight.float() if masters else weight) and rows[0].dtype == weight.dtype
    for key, buffer in whole.named_buffers():
        assert torch.equal(parts[0][1][key], buffer) and parts[0][1][key].dtype == buffer.dtype


def resident(key):
    """Megabytes: VmRSS is what the process holds, VmHWM the most it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def test_a_process_needs_memory_for_its_own_shards_only(models, tmp_path):
    tokenizer().save_pretrained(tmp_path)
    config = hybrid_config(
        LlamaConfig(
            vocab_size=16_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12,
            num_key_value_heads=4, tie_word_embeddings=True,
        ),
        layer_types=["linear_attention", "full_attention"] * 4,
    )  # fmt: skip
    save_model(tmp_path / "model", config, HybridMambaForCausalLM(config).bfloat16().named_parameters(), tmp_path)
    grown, whole = {}, 0.0
    shards(tmp_path / "model", 0, 64, torch.bfloat16, True)  # which imports what FSDP needs
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests left free would be taken first
    for world in (1, 8):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the most begins anew
        before = resident("VmRSS")
        held, _ = shards(tmp_path / "model", 0, world, torch.bfloat16, True)
        grown[world] = resident("VmHWM") - before
        whole = whole or sum(t.numel() * 4 for t in held.values()) / 2**20
        del held
    print(f"{whole:.0f} MB of fp32 masters; one process of 1 and of 8 grows by {grown} MB")
    assert whole > 200
    assert whole < grown[1] < 1.9 * whole  # once, and the file's pages, half as large
    assert grown[8] < 0.3 * whole
