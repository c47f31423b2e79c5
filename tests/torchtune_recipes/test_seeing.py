"""What a run shows of itself besides its losses: samples and the residual streams, which must change nothing."""

import json
import sys

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from mamba_hybrid.checkpoint import load_model
from torchtune_recipes.data import load_tokenizer
from torchtune_recipes.distill_hybrid import DistillHybrid, run
from torchtune_recipes.metrics import JSONLLogger

from .conftest import metrics, start

LOSSES = ("step", "loss", "kl", "ce", "agreement", "grad_norm")
SAMPLES = {"samples": {"prompts": ["ab cd", "x"], "every": 2, "max_new_tokens": 5}}


def losses(path):
    return [{key: row[key] for key in LOSSES} for row in metrics(path)]


def samples(path):
    return [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]


def ready(cfg) -> DistillHybrid:
    recipe = DistillHybrid(cfg)
    recipe.setup()
    return recipe


def answer(model, tokenizer, prompt, new):
    """By the model's own generate, with its cache."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_neither_changes_the_losses(config, models, tmp_path):
    settings = {"max_steps": 4, "checkpoint_every_n_steps": None, "enable_activation_checkpointing": True}
    assert run(config(**settings, output_dir=str(tmp_path / "plain"))) == 0
    assert run(config(**settings, **SAMPLES, log_layers_every=2)) == 0
    seen = tmp_path / "run"
    assert losses(seen) == losses(tmp_path / "plain")
    rows = samples(seen)
    assert [(r["step"], r["prompt"]) for r in rows] == [(s, p) for s in (2, 4) for p in SAMPLES["samples"]["prompts"]]
    # the last are those of the student that was written
    student, tokenizer = load_model(seen / "hybrid"), load_tokenizer(str(models / "hybrid"))
    assert [r["answer"] for r in rows[2:]] == [answer(student, tokenizer, r["prompt"], 5) for r in rows[2:]]
    names = [f"residual_error_layer_{i}" for i in range(4)]
    for row in metrics(seen):
        assert [name in row for name in names] == [row["step"] % 2 == 0] * 4


def test_errors_of_the_streams(config, models, tmp_path):
    recipe = ready(config())
    tokens, docs, labels = recipe.data.batch(recipe.order.step_rows(0).ravel())
    recipe.cleanup()
    assert run(config(max_steps=1, log_layers_every=1, gradient_accumulation_steps=1)) == 0
    (row,) = metrics(tmp_path / "run")
    outs = {name: [] for name in ("hybrid", "teacher")}
    for name, out in outs.items():
        model = load_model(models / name)
        for layer in model.model.layers:
            layer.register_forward_hook(lambda _, i, o, out=out: out.append(o))
        with torch.no_grad():
            model(tokens, document_ids=docs)
    counted = labels != -100
    for i, (s, t) in enumerate(zip(*outs.values(), strict=True)):
        each = [
            ((s[b] - t[b])[counted[b]].square().sum() / t[b][counted[b]].square().sum(), counted[b].sum())
            for b in range(len(tokens))
        ]
        expected = sum(e * n for e, n in each) / counted.sum()
        assert row[f"residual_error_layer_{i}"] == pytest.approx(float(expected), rel=1e-4)


def test_two_processes_give_the_answers_of_one(config, overrides, tmp_path):
    words = {f"samples.{key}": value for key, value in SAMPLES["samples"].items()}
    settings = {"max_steps": 2, "log_layers_every": 1}
    two = overrides(output_dir=str(tmp_path / "two"), batch_size=2, **settings, **words)
    process = start(two, "--nproc_per_node", "2")
    assert run(config(output_dir=str(tmp_path / "one"), **settings, **SAMPLES)) == 0
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert samples(tmp_path / "one") == samples(tmp_path / "two")
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for key in a:
            if key.startswith(("residual_error", "grad_norm")):
                assert b[key] == pytest.approx(a[key], rel=1e-3)


def test_loggers_that_take_text_get_it_and_a_resumed_run_repeats_nothing(config, tmp_path):
    class Writer(JSONLLogger):
        said: list = []

        def log_text(self, name, text, step):
            self.said.append((name, step))

    recipe = ready(config(max_steps=4, **SAMPLES))
    recipe.loggers = [Writer(str(tmp_path / "m.jsonl"))]
    try:
        recipe.step = 2
        recipe.after_step()
        recipe.step = 3
        recipe.after_step()
    finally:
        recipe.cleanup()
    assert Writer.said == [("samples", 2)] and len(samples(tmp_path / "run")) == 2
    with (tmp_path / "run" / "samples.jsonl").open("a") as f:
        f.write('{"step": 4, "pro')  # a run was killed here
    recipe.samples.rewind(tmp_path / "run", 2)
    assert len(samples(tmp_path / "run")) == 2
    recipe.samples.rewind(tmp_path / "run", 1)
    assert samples(tmp_path / "run") == []
    assert hasattr(SummaryWriter, "add_text")  # what torchtune's TensorBoardLogger has as _writer


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"samples": {"prompts": [], "every": 1}}, "samples.prompts"),
        ({"samples": {"prompts": ["a"], "every": 0}}, "samples.every 0 must be a whole number above 0"),
        ({"samples": {"prompts": ["a"], "evry": 1}}, "unknown config key samples.evry"),
        ({"samples": {"prompts": ["a"], "every": 1, "max_new_tokens": 9999}}, "over the model's 512"),
        ({"log_layers_every": 0}, "log_layers_every 0"),
    ],
)
def test_what_is_wrong_is_named(config, settings, message, capsys):
    assert run(config(max_steps=1, **settings)) == 1
    assert message in capsys.readouterr().err


def test_a_logger_whose_package_is_not_there(config, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    cfg = config(max_steps=1)
    cfg.metric_loggers = [{"_component_": "torchtune.training.metric_logging.WandBLogger", "project": "p"}]
    assert run(cfg) == 1
    err = capsys.readouterr().err
    assert "metric_loggers: torchtune.training.metric_logging.WandBLogger needs a package" in err and "wandb" in err
