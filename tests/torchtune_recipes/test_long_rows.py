"""Rows that are trained in chunks with state carried: the losses of whole rows, less memory."""

import pytest
import torch
from torch._dynamo.utils import counters

from mamba_hybrid.convert import Conversion, convert
from torchtune_recipes.distill_hybrid import DistillHybrid, run

from .conftest import metrics


@pytest.fixture(scope="module")
def with_convolution(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("conv") / "hybrid"
    convert(Conversion(str(models / "teacher"), str(out), mixer={"window": 5, "short_conv": 4, "state_heads": 2}))
    return out


def first_step(cfg):
    """Sums of a run's first step, and the largest number of bytes kept for one backward pass of the student."""
    recipe = DistillHybrid(cfg)
    kept = [0]

    def pack(t):
        kept[-1] += t.numel() * t.element_size()
        return t

    def count(*_):
        kept.append(0)

    try:
        recipe.setup()
        recipe.student.register_forward_pre_hook(count)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            sums, _ = recipe.train_step()
    finally:
        recipe.cleanup()
    return sums, max(kept)


@pytest.mark.parametrize(
    ("student", "recompute", "chunk"), [("hybrid", False, 100), ("convolution", False, 24), ("convolution", True, 100)]
)
def test_losses_of_whole_rows_with_less_memory(config, models, with_convolution, student, recompute, chunk):
    path = models / "hybrid" if student == "hybrid" else with_convolution
    settings = {
        "student": str(path), "dataset.max_seq_len": 480, "batch_size": 1, "enable_activation_checkpointing": recompute,
    }  # fmt: skip
    whole, all_bytes = first_step(config(**settings))
    sums, some_bytes = first_step(config(**settings, sequence_chunk=chunk))
    # loss, KL, cross-entropy, agreement; the gradient is another one, since it is cut at borders
    torch.testing.assert_close(sums[:4], whole[:4], rtol=1e-4, atol=1e-4)
    assert 0.3 * whole[4] < sums[4] != whole[4]
    # not quite in proportion: of keys, values and masks a chunk keeps the earlier ones too
    assert some_bytes < all_bytes * (chunk / 480 + 0.35)


def test_a_whole_row_is_one_chunk(config):
    settings = {"dataset.max_seq_len": 96, "batch_size": 2}
    whole, _ = first_step(config(**settings))
    assert torch.equal(first_step(config(**settings, sequence_chunk=96))[0], whole)


def test_chunks_of_all_layers_share_their_graphs(config, monkeypatch, compile_with):
    """And torch's limit of recompilations is not met, behind which it runs layers uncompiled."""
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    settings = {"dataset.max_seq_len": 90, "batch_size": 1, "sequence_chunk": 40}
    plain, _ = first_step(config(**settings))
    compile_with("eager")
    sums, _ = first_step(config(**settings, compile=True))
    # attention and mixers, with gradients and without, of the first chunk, the second and the third, which is shorter
    assert 8 < counters["stats"]["unique_graphs"] <= 12 and not counters["graph_break"]
    torch.testing.assert_close(sums, plain, rtol=1e-4, atol=1e-4)


def test_it_learns_from_chunks(config, tmp_path):
    more = {"dataset.max_seq_len": 400, "batch_size": 2, "sequence_chunk": 128, "mixer_lr": 3e-3, "rest_lr": 1e-3}
    assert run(config(max_steps=12, **more)) == 0
    rows = metrics(tmp_path / "run")
    assert rows[-1]["kl"] < 0.8 * rows[0]["kl"]
