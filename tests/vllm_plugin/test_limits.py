"""What the plugin asks of the engine's configuration, and the slots it derives from it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mamba_hybrid.checkpoint import load_config
from vllm_plugin.limits import Limits, slot_layout

HEADS = SimpleNamespace(num_key_value_heads=2, layer_types=["full_attention", "linear_attention"])


def engine(
    hf_config=HEADS,
    *,
    drafts=0,
    tensor=1,
    stages=1,
    prefix=False,
    state="auto",
    v2=False,
    draft_layers=None,
    draft_tensor=1,
    scheduler=None,
):
    """The part of vLLM's configuration that is read."""
    draft = draft_layers and SimpleNamespace(hf_config=SimpleNamespace(layer_types=draft_layers))
    return SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=tensor, pipeline_parallel_size=stages),
        cache_config=SimpleNamespace(mamba_ssm_cache_dtype=state, enable_prefix_caching=prefix),
        speculative_config=SimpleNamespace(
            draft_model_config=draft,
            uses_draft_model=lambda: draft is not None,
            draft_tensor_parallel_size=draft_tensor,
        )
        if drafts
        else None,
        scheduler_config=SimpleNamespace(scheduler_cls=scheduler),
        use_v2_model_runner=v2,
        num_speculative_tokens=drafts,
        model_config=SimpleNamespace(hf_config=hf_config, dtype=torch.bfloat16),
    )


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"tensor": 4}, "--tensor-parallel-size 4 does not divide the model's 2 key/value heads"),
        ({"state": "float16"}, "--mamba-ssm-cache-dtype float16"),
        ({"stages": 2}, "--pipeline-parallel-size 2 leaves stage 0 without mixers"),
        (
            {"tensor": 2, "drafts": 3, "v2": True, "draft_layers": ["linear_attention"]},
            "draft_tensor_parallel_size 1 of a draft model with mixers must be --tensor-parallel-size 2",
        ),
    ],
)
def test_refuses(changes, flag):
    with pytest.raises(ValueError, match=flag):
        Limits.verify_and_update_config(engine(**changes))


@pytest.mark.parametrize(
    ("layers", "changes", "stays"),
    [
        (["full_attention", "linear_attention"], {}, True),
        (["full_attention", "linear_attention"], {"drafts": 3}, False),
        (["full_attention", "linear_attention"], {"drafts": 3, "v2": True}, True),
        (["full_attention", "linear_attention"], {"drafts": 3, "v2": True, "draft_layers": ["full_attention"]}, True),
        (
            ["full_attention", "linear_attention"],
            {"drafts": 3, "v2": True, "draft_layers": ["linear_attention"]},
            False,
        ),
        (["linear_attention", "linear_attention"], {}, False),
        (["linear_attention", "full_attention"] * 2, {"stages": 2}, True),
    ],
)
def test_prefix_caching_where_it_fits(layers, changes, stays):
    config = engine(SimpleNamespace(layer_types=layers, num_key_value_heads=2), prefix=True, **changes)
    Limits.verify_and_update_config(config)
    assert config.cache_config.enable_prefix_caching is stays


def test_the_scheduler_that_counts():
    """Of a hybrid that is served, but not of one that drafts for another model, and not where the user names one."""
    config = engine()
    Limits.verify_and_update_config(config)
    assert config.scheduler_config.scheduler_cls == "vllm_plugin.scheduler.make_scheduler"
    config = engine(scheduler="their.Scheduler")
    Limits.verify_and_update_config(config)
    assert config.scheduler_config.scheduler_cls == "their.Scheduler"
    config = engine(drafts=3, v2=True, draft_layers=["linear_attention"])
    config.model_config = config.speculative_config.draft_model_config
    config.model_config.hf_config = HEADS
    Limits.verify_and_update_config(config)
    assert config.scheduler_config.scheduler_cls is None


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
