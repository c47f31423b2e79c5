"""What the plugin asks of the engine's configuration, and the slots it derives from it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mamba_hybrid.checkpoint import load_config
from vllm_plugin.limits import Limits, graph_sizes, slot_layout
from vllm_plugin.model import HybridMambaForCausalLM

WHEN = {"drafts": "when they pay"}
HEADS = SimpleNamespace(num_key_value_heads=2, layer_types=["full_attention", "linear_attention"])


STAGED = SimpleNamespace(num_key_value_heads=2, layer_types=["full_attention", "linear_attention"] * 2)


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
    graphs=None,
    schedule=None,
    mode="balanced",
    seqs=256,
    data=1,
    adaptive=False,
    target_layers=None,
    cache="auto",
    asked=None,
):
    """The part of vLLM's configuration that is read."""
    draft = draft_layers and SimpleNamespace(hf_config=SimpleNamespace(layer_types=draft_layers))
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            tensor_parallel_size=tensor, pipeline_parallel_size=stages, data_parallel_size=data, worker_cls="auto"
        ),
        cache_config=SimpleNamespace(
            mamba_ssm_cache_dtype=state, mamba_cache_dtype=cache, enable_prefix_caching=prefix
        ),
        speculative_config=SimpleNamespace(
            draft_model_config=draft,
            target_model_config=SimpleNamespace(
                hf_config=SimpleNamespace(layer_types=target_layers or hf_config.layer_types)
            ),
            uses_draft_model=lambda: draft is not None,
            draft_tensor_parallel_size=draft_tensor,
            num_speculative_tokens_per_batch_size=schedule,
            enable_adaptive_verification=adaptive,
        )
        if drafts
        else None,
        scheduler_config=SimpleNamespace(scheduler_cls=scheduler, max_num_seqs=seqs, max_num_batched_tokens=8192),
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=graphs, max_cudagraph_capture_size=None),
        uniform_decode_query_len=drafts + 1,
        performance_mode=mode,
        additional_config={"mamba_hybrid": asked} if asked else {},
        use_v2_model_runner=v2,
        num_speculative_tokens=drafts,
        model_config=SimpleNamespace(hf_config=hf_config, dtype=torch.bfloat16),
    )


def gpu():
    """What is asked of a platform that has one."""
    return SimpleNamespace(is_cuda=lambda: True, is_device_capability_family=lambda family: family == 90)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"tensor": 4}, "--tensor-parallel-size 4 does not divide the model's 2 key/value heads"),
        ({"state": "float16"}, "--mamba-ssm-cache-dtype float16"),
        ({"cache": "float32"}, "--mamba-cache-dtype float32 is not for mixers"),
        ({"stages": 2}, "--pipeline-parallel-size 2 leaves stage 0 without mixers"),
        (
            {"stages": 2, "drafts": 3, "v2": True, "draft_layers": ["full_attention"], "hf_config": STAGED},
            "--pipeline-parallel-size 2 excludes a draft model",
        ),
        (
            {"tensor": 2, "drafts": 3, "v2": True, "draft_layers": ["linear_attention"]},
            "draft_tensor_parallel_size 1 of a draft model with mixers must be --tensor-parallel-size 2",
        ),
        ({"asked": {"drafts": "always"}}, "asks {'drafts': 'always'} of mamba_hybrid, which knows"),
        ({"asked": WHEN}, "needs a draft model in --speculative-config"),
        ({"asked": WHEN, "drafts": 3}, "needs a draft model in --speculative-config"),
        *(
            (
                {"asked": WHEN, "drafts": 3, "v2": True, "draft_layers": ["full_attention"]} | changes,
                f'--additional-config {{"mamba_hybrid": {{"drafts": "when they pay"}}}} {obstacle}',
            )
            for changes, obstacle in (
                ({"v2": False}, "needs Model Runner V2"),
                ({"target_layers": ["full_attention"]}, "needs a hybrid as the target"),
                ({"data": 2}, "excludes --data-parallel-size"),
                ({"scheduler": "mine.Scheduler"}, "excludes --scheduler-cls mine.Scheduler"),
                ({"adaptive": True}, "excludes enable_adaptive_verification"),
                ({"schedule": [(1, 256, 2)]}, "excludes num_speculative_tokens_per_batch_size"),
            )
        ),
    ],
)
def test_refuses(changes, flag):
    with pytest.raises(ValueError, match=flag):
        Limits.verify_and_update_config(engine(**changes))


@pytest.mark.parametrize(("draft_layers", "most"), [(None, 15), (["full_attention"], 15), (["linear_attention"], 14)])
def test_a_gpu_takes_as_many_drafts_as_its_kernels(draft_layers, most, monkeypatch):
    changes = {"v2": True, "draft_layers": draft_layers}
    Limits.verify_and_update_config(engine(drafts=most + 1, **changes))
    monkeypatch.setattr("vllm_plugin.limits.current_platform", gpu())
    config = engine(drafts=most, **changes)
    Limits.verify_and_update_config(config)
    assert config.parallel_config.worker_cls == "vllm_plugin.worker.HybridWorker"
    with pytest.raises(ValueError, match=f"num_speculative_tokens {most + 1} .* must be at most {most}"):
        Limits.verify_and_update_config(engine(drafts=most + 1, **changes))


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
@pytest.mark.parametrize(
    ("drafts", "draft", "step", "rewind"),
    [(0, None, 1, 0), (4, None, 5, 5), (4, "full_attention", 5, 5), (4, "linear_attention", 6, 6)],
)
def test_slot(hybrids, state, drafts, draft, step, rewind):
    config = engine(load_config(hybrids["shared"]), drafts=drafts, state=state, draft_layers=draft and [draft])
    layout = slot_layout(config)
    assert (layout.step, layout.rewind) == (step, rewind)
    assert layout.ring >= 16 + step + rewind
    fields = layout.fields()
    assert fields["state"] == ((2, 32, 32), torch.bfloat16 if state == "bfloat16" else torch.float32)
    assert fields["x"] == ((layout.ring, 2, 32), torch.bfloat16)
    sizes = [dtype.itemsize for _, dtype in fields.values()]
    assert sizes == sorted(sizes, reverse=True)  # vLLM lays them out in this order and views them by dtype


def test_a_page_holds_the_slots_of_the_draft_model_too(hybrids):
    """One of more states than the target's; and one of the same shape, where the two have the same slots."""
    small, large = load_config(hybrids["shared"]), load_config(hybrids["shared"])
    large.state_heads = large.num_attention_heads
    config = engine(small, drafts=5, v2=True, draft_layers=["linear_attention"])
    draft = config.speculative_config.draft_model_config = SimpleNamespace(hf_config=large, dtype=torch.bfloat16)
    target, drafted = HybridMambaForCausalLM.get_mamba_specs_from_config(config)
    assert target.page_size_bytes == slot_layout(config).bytes()
    assert drafted.page_size_bytes == slot_layout(config, draft).bytes() > target.page_size_bytes
    draft.hf_config = small
    assert len(set(HybridMambaForCausalLM.get_mamba_specs_from_config(config))) == 1
    assert len(HybridMambaForCausalLM.get_mamba_specs_from_config(engine(small, drafts=5))) == 1


def test_verify_steps_of_all_sequences_are_captured():
    config = engine(drafts=4)
    Limits.verify_and_update_config(config)
    sizes = config.compilation_config.cudagraph_capture_sizes
    assert sizes == graph_sizes(256, 5, 8192)
    assert sizes[-1] == 256 * 5 and {5 * n for n in range(8, 257, 8)} <= set(sizes)

    left_alone = [{"graphs": [8]}, {"schedule": [(1, 256, 2)]}, {"mode": "interactivity"}, {"drafts": 0}]
    for left in (engine(**{"drafts": 4} | changes) for changes in left_alone):
        before = left.compilation_config.cudagraph_capture_sizes
        Limits.verify_and_update_config(left)
        assert left.compilation_config.cudagraph_capture_sizes == before


@pytest.mark.parametrize(("rows", "tokens", "most"), [(1, 2, 8192), (3, 5, 8192), (100, 9, 512), (1024, 5, 2048)])
def test_graphs_for_all_that_is_asked(rows, tokens, most):
    sizes = graph_sizes(rows, tokens, most)
    assert sizes == sorted(set(sizes)) and sizes[-1] <= most
    # each number of sequences that decode, and each that a draft model drafts for, has a graph within vLLM's spacing
    for n in range(1, min(rows, 512, most // tokens) + 1):
        for needed in (n, n * tokens):
            assert min(size for size in sizes if size >= needed) - needed <= 15 * tokens


def test_drafts_when_they_pay():
    config = engine(drafts=3, v2=True, draft_layers=["full_attention"], asked=WHEN, seqs=1)
    for _ in range(2):  # vLLM may settle a configuration again
        Limits.verify_and_update_config(config)
        assert config.compilation_config.cudagraph_capture_sizes == graph_sizes(1, 4, 8192)
