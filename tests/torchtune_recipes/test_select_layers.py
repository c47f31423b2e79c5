import json
import os

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from mamba_hybrid.checkpoint import load_model
from mamba_hybrid.convert import Conversion, convert
from torchtune_recipes.select_layers import SelectLayers, run

from .conftest import metrics, start, stop_after

BROKEN = [1, 2]  # of four layers
LEFT_OUT = ("mixer_lr", "rest_lr", "loss", "freeze")  # that a selection does not have
SETTINGS = {
    "method": "gates",
    "attention_layers": 2,
    "gate_lr": 0.3,
    "temperature": [1.0, 0.1],
    "recall": {"weight": 0.1, "pairs": 4},
    "evaluation_steps": 2,
}


@pytest.fixture(scope="session")
def mixers(models, tmp_path_factory):
    """A hybrid of `teacher` without attention, in which some layers' mixers answer badly and the others perfectly: the
    tests' rows do not get longer than the window."""
    out = tmp_path_factory.mktemp("select") / "mixers"
    convert(Conversion(str(models / "teacher"), str(out), keep=0.0, mixer={"window": 64}))
    weights = load_file(out / "model.safetensors")
    rng = torch.Generator().manual_seed(0)
    for i in BROKEN:
        w = weights[f"model.layers.{i}.mixer.o_proj.weight"]
        w += w.std() * torch.randn(w.shape, generator=rng)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture
def selection(config, mixers):
    """The tests' configuration for this recipe."""

    def make(**more):
        cfg = config(**{"student": str(mixers)} | SETTINGS | more)
        for key in LEFT_OUT:
            cfg.pop(key, None)
        return cfg

    return make


def ready(cfg) -> SelectLayers:
    recipe = SelectLayers(cfg)
    recipe.setup()
    return recipe


def result(run) -> dict:
    return json.loads((run / "layers.json").read_text())


@pytest.mark.parametrize(
    ("method", "steps"), [("gates", 20), ("leave_one_out", 2), ("greedy", 4)], ids=lambda v: str(v)
)
def test_attention_stays_where_mixers_answer_badly(method, steps, selection, tmp_path, capsys):
    assert run(selection(method=method, max_steps=steps)) == 0
    found = result(tmp_path / "run")
    assert found["attention_layers"] == BROKEN and found["layers"] == 4 and found["budget"] == 2
    assert min(found["scores"][i] for i in BROKEN) > max(s for i, s in enumerate(found["scores"]) if i not in BROKEN)
    chosen, evenly, none = (found["evaluation"][name] for name in ("chosen", "uniform", "mixers only"))
    assert chosen["attention_layers"] == BROKEN and evenly["attention_layers"] == [1, 3]
    assert abs(chosen["kl"]) < 1e-4 < 0.02 < evenly["kl"] < none["kl"]
    assert chosen["agreement"] == 1 > evenly["agreement"]
    assert found["settings"]["method"] == method
    assert "attention stays in layers 1, 2" in (said := capsys.readouterr().out) and "run/layers.json" in said
    rows = metrics(tmp_path / "run")
    assert len(rows) == steps
    if method == "gates":
        gates = [[row[f"gate_layer_{i}"] for i in range(4)] for row in rows]
        assert gates[0] == pytest.approx([0.5] * 4)
        assert all(sum(values) == pytest.approx(2, abs=1e-4) for values in gates)
        assert min(gates[-1][i] for i in BROKEN) > 0.9
        assert rows[-1]["kl"] < rows[0]["kl"]
        for row in rows:
            assert row["loss"] == pytest.approx(row["kl"] + 0.1 * row["recall_loss"], rel=1e-4)
    else:
        assert {"kl_layer_0", "kl_layer_3"} <= rows[0].keys()
        for row in rows[: 2 if method == "leave_one_out" else 1]:
            assert row["kl_layer_1"] < row["loss"]


def test_uniform_measures_only(selection, tmp_path):
    assert run(selection(method="uniform")) == 0
    found = result(tmp_path / "run")
    assert found["attention_layers"] == [1, 3] and found["scores"] is None
    assert found["evaluation"]["chosen"] == found["evaluation"]["uniform"]
    assert metrics(tmp_path / "run") == []


def test_the_blend_against_the_models_it_is_made_of(selection, models, mixers):
    """All gates open are the teacher, none is the student, and one layer's attention is the teacher's."""
    recipe = ready(selection())
    try:
        batch = recipe.data.batch(recipe.order.step_rows(0).ravel())
        target = recipe.teacher(batch.tokens, batch.documents)
        kls = {}
        with torch.no_grad():
            for name, layers in {"all": [0, 1, 2, 3], "none": [], "one": [1]}.items():
                kls[name] = recipe.student("imitate", recipe._open(layers), *batch, target)[0].kl.item()
            tokens, asked, answers = rows = recipe._recall_rows(batch.tokens, 0)
            surprise, right = recipe.student("recall", recipe._open([]), *rows)
    finally:
        recipe.cleanup()
    teacher, student = (load_model(path) for path in (models / "teacher", mixers))
    counted = batch.labels != -100

    def kl() -> float:
        with torch.no_grad():
            p, q = (m(batch.tokens, document_ids=batch.documents).logits.log_softmax(-1) for m in (teacher, student))
        return float((p.exp() * (p - q)).sum(-1)[counted].sum())

    with torch.no_grad():
        q = student(tokens).logits.log_softmax(-1)
    told = q[torch.arange(len(asked))[:, None], asked]
    assert surprise.item() == pytest.approx(-told.gather(-1, answers[..., None]).sum().item(), rel=1e-4)
    assert right.item() == (told.argmax(-1) == answers).sum()
    assert abs(kls["all"]) < 1e-3
    assert kls["none"] == pytest.approx(kl(), rel=1e-4)
    student.model.layers[1].self_attn, student.model.layers[1].is_mixer = teacher.model.layers[1].self_attn, False
    assert kls["one"] == pytest.approx(kl(), rel=1e-4)


def test_one_process_and_two_choose_alike_and_a_run_goes_on(selection, overrides, mixers, tmp_path):
    assert run(selection(output_dir=str(tmp_path / "one"))) == 0
    more = {"student": str(mixers), "output_dir": str(tmp_path / "two"), "batch_size": 2, "freeze": None}
    words = overrides(**SETTINGS | more)
    words = {k: v for k, v in words.items() if k.partition(".")[0] not in ("freeze", "loss", "recall")}
    words |= {"recall.weight": 0.1, "recall.pairs": 4}
    two = start(words, "--nproc_per_node", "2", recipe="select_layers", without=LEFT_OUT)
    _, err = two.communicate(timeout=300)
    assert two.returncode == 0, err
    a, b = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(a) == len(b) == 10
    for row, other in zip(a, b, strict=True):
        for key in row.keys() - {"tokens_per_s", "seconds", "tflops"}:
            assert other[key] == pytest.approx(row[key], rel=1e-4, abs=1e-6), key
    one, two = (result(tmp_path / name) for name in ("one", "two"))
    assert one["attention_layers"] == two["attention_layers"]
    for name, values in one["evaluation"].items():
        other = two["evaluation"][name]
        assert other.pop("attention_layers") == values["attention_layers"]
        assert other == pytest.approx({key: values[key] for key in other}, rel=1e-4, abs=1e-6), name
    # stopped after four of the ten steps
    out = str(tmp_path / "parts")
    recipe = ready(selection(output_dir=out))
    stop_after(recipe, 4)
    assert sum(os.path.getsize(p) for p in (tmp_path / "parts" / "step_4").iterdir()) < 60_000  # the gates alone
    assert run(selection(output_dir=out)) == 0
    parts = result(tmp_path / "parts")
    assert parts["scores"] == one["scores"] and parts["evaluation"] == one["evaluation"]


def test_recomputed_activations_and_bf16(selection, tmp_path):
    losses = {}
    for kind, more in {
        "plain": {},
        "recomputed": {"enable_activation_checkpointing": True, "gradient_accumulation_steps": 2, "batch_size": 2},
        "bf16": {"dtype": "bf16"},
    }.items():
        assert run(selection(output_dir=str(tmp_path / kind), max_steps=3, evaluation_steps=1, **more)) == 0
        losses[kind] = [row[key] for row in metrics(tmp_path / kind) for key in ("kl", "recall_loss", "gate_layer_1")]
    assert losses["recomputed"] == pytest.approx(losses["plain"], rel=1e-4)
    assert losses["bf16"] == pytest.approx(losses["plain"], rel=0.1)
    assert losses["bf16"] != losses["plain"]


def test_trials_go_on_too(selection, tmp_path):
    method = "greedy"
    assert run(selection(method=method, max_steps=4, output_dir=str(tmp_path / "whole"))) == 0
    recipe = ready(selection(method=method, max_steps=4))
    recipe._unread.append(recipe.train_step())
    recipe.step = 1
    recipe.save_checkpoint()
    recipe.cleanup()
    assert run(selection(method=method, max_steps=4)) == 0
    assert result(tmp_path / "run")["scores"] == result(tmp_path / "whole")["scores"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "best"}, "method 'best' is none of gates, leave_one_out, greedy, uniform"),
        ({"attention_layers": 4}, "attention_layers 4 must be below the 4 layers"),
        ({"attention_layers": 0}, "attention_layers 0 must be a whole number above 0"),
        ({"temperature": [1.0, 0.0]}, "temperature [1.0, 0.0] must be two numbers above 0"),
        ({"recall": {"pairs": 12, "weight": 1.0}}, "recall.pairs 12 need rows of 49 tokens"),
        ({"recall": {"pears": 1}}, "unknown config key recall.pears"),
        ({"method": "greedy", "max_steps": 1}, "greedy takes a round for each of 2 attention_layers"),
        ({"student": "hybrid"}, "has no mixer in layers [1, 3]; convert the teacher with --keep 0"),
        ({"teacher": "hybrid"}, "has mixers in layers [0, 2]; it must have none"),
        ({"mixer_lr": 1.0}, "unknown config key mixer_lr"),
        ({"dataset.streaming": True}, "selecting takes no stream; set dataset.streaming=False"),
    ],
)
def test_refused(selection, models, tmp_path, capsys, changes, words):
    if set(changes) & {"student", "teacher"}:
        changes = {key: str(models / "hybrid") for key in changes}
    cfg = selection()
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, merge=False)
    assert run(cfg) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and words in errors[0], errors
    assert not (tmp_path / "run" / "layers.json").exists()
