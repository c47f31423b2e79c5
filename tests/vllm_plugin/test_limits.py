"""What the plugin asks of the engine's configuration, and the slots it derives from it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mamba_hybrid.checkpoint import load_config
from vllm_plugin.limits import Limits, slot_layout


def engine(hf_config=None, *, drafts=0, tensor=1, pipeline=1, prefix=False, state="auto"):
    """The part of vLLM's configuration that is read."""
    return SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=tensor, pipeline_parallel_size=pipeline),
        cache_config=SimpleNamespace(mamba_ssm_cache_dtype=state, enable_prefix_caching=prefix),
        speculative_config=SimpleNamespace() if drafts else None,
        num_speculative_tokens=drafts,
        model_config=SimpleNamespace(hf_config=hf_config, dtype=torch.bfloat16),
    )


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"tensor": 2}, "--tensor-parallel-size 2"),
        ({"pipeline": 2}, "--pipeline-parallel-size 2"),
        ({"state": "float16"}, "--mamba-ssm-cache-dtype float16"),
    ],
)
def test_refuses(changes, flag):
    with pytest.raises(ValueError, match=flag):
        Limits.verify_and_update_config(engine(**changes))


@pytest.mark.parametrize(
    ("layers", "drafts", "stays"),
    [
        (["full_attention", "linear_attention"], 0, True),
        (["full_attention", "linear_attention"], 3, False),
        (["linear_attention", "linear_attention"], 0, False),
    ],
)
def test_prefix_caching_where_it_fits(layers, drafts, stays):
    config = engine(SimpleNamespace(layer_types=layers), prefix=True, drafts=drafts)
    Limits.verify_and_update_config(config)
    assert config.cache_config.enable_prefix_caching is stays


@pytest.mark.parametrize("state", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize(("drafts", "draft", "step", "rewind"), [(0, False, 1, 0), (4, False, 5, 5), (4, True, 6, 6)])
def test_slot(hybrids, state, drafts, draft, step, rewind):
    layout = slot_layout(engine(load_config(hybrids["shared"]), drafts=drafts, state=state), draft=draft)
    assert (layout.step, layout.rewind) == (step, rewind)
    assert layout.ring >= 16 + step + rewind
    fields = layout.fields()
    assert fields["state"] == ((2, 32, 32), torch.bfloat16 if state == "bfloat16" else torch.float32)
    assert fields["x"] == ((layout.ring, 2, 32), torch.bfloat16)
    sizes = [dtype.itemsize for _, dtype in fields.values()]
    assert sizes == sorted(sizes, reverse=True)  # vLLM lays them out in this order and views them by dtype
