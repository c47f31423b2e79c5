"""The same losses however the models lie on the processes and their memory."""

import pytest
import torch
from torch import nn
from torchao.optim.subclass_8bit import OptimState8bit

from mamba_hybrid.checkpoint import open_model
from mamba_hybrid.model import HybridLayer
from torchtune_recipes.distill_hybrid import DistillHybrid, run
from torchtune_recipes.models import compute_in_fp8

from .conftest import branch, forked, metrics

NUMBERS = ("loss", "kl", "agreement", "grad_norm")


def test_replicas_of_shards_have_the_losses_of_one_process(overrides, config, tmp_path):
    """Four processes, two and two of them with a copy of the model, and the teacher in host memory."""
    assert run(config(output_dir=str(tmp_path / "one"))) == 0
    words = overrides(batch_size=1, data_parallel_shard=2, offload_teacher=True, checkpoint_every_n_steps=0)
    forked("distill_hybrid", 4, words)
    rows, one = metrics(tmp_path / "run"), metrics(tmp_path / "one")
    assert len(one) == 10
    for row, other in zip(rows, one, strict=True):
        assert [row[key] for key in NUMBERS] == pytest.approx([other[key] for key in NUMBERS], rel=1e-4, abs=1e-4)


def test_where_the_teacher_lies_changes_nothing(config, tmp_path):
    for name, offload in (("device", False), ("host", True)):
        assert run(config(output_dir=str(tmp_path / name), max_steps=4, offload_teacher=offload)) == 0
    device, host = metrics(tmp_path / "device"), metrics(tmp_path / "host")
    assert [row["loss"] for row in host] == [row["loss"] for row in device]


def test_every_second_layer_computed_again(config, tmp_path):
    losses, calls = {}, {}
    for every in (None, 1, 2):
        settings = (
            {} if every is None else dict(enable_activation_checkpointing=True, activation_checkpoint_every=every)
        )
        recipe = DistillHybrid(config(**settings))
        recipe.setup()
        try:
            counts = dict.fromkeys(range(4), 0)
            handles = [
                layer.input_layernorm.register_forward_hook(lambda *_, i=layer.layer, c=counts: c.update({i: c[i] + 1}))
                for layer in recipe.student.modules()
                if isinstance(layer, HybridLayer)
            ]
            sums, _ = recipe.train_step()
        finally:
            recipe.cleanup()
        assert len(handles) == 4
        losses[every], calls[every] = sums, list(counts.values())
    assert calls == {None: [1, 1, 1, 1], 1: [2, 2, 2, 2], 2: [2, 1, 2, 1]}
    assert torch.equal(losses[1], losses[None]) and torch.equal(losses[2], losses[None])


def test_projections_are_what_computes_in_fp8(models):
    model, _ = open_model(models / "hybrid", torch.bfloat16)
    before = set(model.state_dict())
    compute_in_fp8(model)
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    mixer, other = (
        next(i for i, layer in enumerate(model.model.layers) if layer.is_mixer == mixer) for mixer in (True, False)
    )
    mlp = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    for layer, names in {
        mixer: {f"mixer.{name}_proj" for name in "qkvzo"} | mlp,
        other: {f"self_attn.{name}_proj" for name in "qkvo"} | mlp,
    }.items():
        start = f"model.layers.{layer}."
        converted = {n.removeprefix(start) for n, kind in kinds.items() if n.startswith(start) and "Float8" in kind}
        assert converted == names
    assert kinds[f"model.layers.{mixer}.mixer.dt_proj"] == "StepLinear" and kinds["lm_head"] == "Linear"
    assert set(model.state_dict()) == before


def test_a_compiled_step_of_the_optimizer_changes_no_losses(overrides, config, compile_with, tmp_path):
    """Against the fused one: on one process, gone on with after a checkpoint, and on two."""
    compile_with("eager")
    settings = dict(max_steps=4, checkpoint_every_n_steps=2, keep_last_n=0, clip_grad_norm=0.5)
    component = "torchtune_recipes.adamw.CompiledAdamW"

    def compiled(run: str):
        cfg = config(output_dir=run, **settings)
        cfg.optimizer = {"_component_": component, "betas": [0.9, 0.95], "weight_decay": 0.0}
        return cfg

    assert run(config(output_dir=str(tmp_path / "fused"), **settings)) == 0
    assert run(compiled(str(tmp_path / "one"))) == 0
    assert run(compiled(branch(tmp_path / "one", 2, tmp_path / "parts"))) == 0
    words = overrides(batch_size=2, **settings) | {"optimizer._component_": component}
    forked("distill_hybrid", 2, words, without=("optimizer.fused",))
    fused, one, parts, two = (metrics(tmp_path / name) for name in ("fused", "one", "parts", "run"))
    assert len(fused) == 4 and any(row["grad_norm"] > 0.5 for row in fused)
    assert [row["loss"] for row in parts] == [row["loss"] for row in one]
    for rows, near in ((one, 1e-5), (two, 1e-4)):
        for row, other in zip(rows, fused, strict=True):
            assert [row[key] for key in NUMBERS] == pytest.approx([other[key] for key in NUMBERS], rel=near, abs=near)


@pytest.mark.parametrize(("chunk", "lengths"), [(None, {48}), (48, {48}), (16, {16, 24}), (20, {20, 8, 28, 16})])
def test_pieces_of_a_row(config, chunk, lengths):
    recipe = DistillHybrid(config(sequence_chunk=chunk))
    recipe.setup()
    recipe.cleanup()
    assert recipe._lengths(recipe.student.model.config.reach) == lengths


def test_eight_bit_optimizer_states_are_saved_and_resumed(config, capsys, monkeypatch, tmp_path):
    """Without torch.compile, which does not build torchao's step for a CPU: the numbers are the same."""
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setattr(DistillHybrid, "_check_torchao", lambda self: None)

    def eight(**more):
        cfg = config(max_steps=4, checkpoint_every_n_steps=2, keep_last_n=0, **more)
        cfg.optimizer = {"_component_": "torchao.optim.AdamW8bit", "weight_decay": 0.01}
        return cfg

    whole = tmp_path / "whole"
    assert run(eight(output_dir=str(whole))) == 0
    assert run(eight(output_dir=branch(whole, 2, tmp_path / "parts"))) == 0
    rows = metrics(whole)
    assert [r["loss"] for r in metrics(tmp_path / "parts")] == [r["loss"] for r in rows] and len(rows) == 4
    recipe = DistillHybrid(eight(output_dir=str(whole)))
    recipe.setup()
    states = [s["exp_avg"] for s in recipe.optimizer.state.values()]
    recipe.cleanup()
    assert any(isinstance(state, OptimState8bit) for state in states)
    # of another number of processes to a model
    file = whole / "step_4" / "recipe_state.json"
    file.write_text(file.read_text().replace('not set)": 1', 'not set)": 2'))
    assert run(eight(output_dir=str(whole))) == 1
    assert (
        "was written with data_parallel_shard (all processes where it is not set) 2, this run has 1"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"data_parallel_shard": 3}, "data_parallel_shard 3 does not divide the 4 processes"),
        ({"data_parallel_shard": 0}, "data_parallel_shard 0 must be a whole number above 0"),
        ({"fp8": True}, "fp8 needs a GPU of compute capability 8.9 or more, this is cpu"),
        (
            {"optimizer._component_": "torchao.optim.AdamW8bit"},
            "compiles its step, which does not build for device cpu",
        ),
        ({"activation_checkpoint_every": 0}, "activation_checkpoint_every 0 must be"),
    ],
)
def test_refused(config, capsys, monkeypatch, more, says):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    assert run(config(**more)) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert says in error
