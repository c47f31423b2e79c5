import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mamba_hybrid.checkpoint import load_model
from mamba_hybrid.compare import compare
from mamba_hybrid.convert import Conversion, convert
from mamba_hybrid.draft import cut
from mamba_hybrid.model import Batch
from tests.matrices import attention_matrices, mixer_matrices, relative
from torchtune_recipes.align_hybrid import AlignHybrid, run

from .conftest import branch, forked, metrics, start, stop_after

SETTINGS = {"mixer_lr": 3e-3, "dataset.max_seq_len": 128}
LEFT_OUT = ("rest_lr", "loss", "freeze", "enable_activation_checkpointing")  # that alignment does not have
UNKNOWN = ("freeze", "loss.chunk_tokens")


@pytest.fixture
def aligned(config):
    """The tests' configuration for this recipe."""

    def make(**more):
        cfg = config(**more)
        for key in LEFT_OUT:
            cfg.pop(key, None)
        return cfg

    return make


def first_rows(cfg) -> tuple[Tensor, ...]:
    """Tokens, documents and labels of the first step."""
    recipe = AlignHybrid(cfg)
    recipe.setup()
    batch = recipe.data.batch(recipe.order.step_rows(0).ravel())
    recipe.cleanup()
    return batch


def mean_of_rows(error_B: Tensor, counted_BL: Tensor) -> float:
    return float((error_B * counted_BL.sum(1)).sum() / counted_BL.sum())


def relative_square(mine: Tensor, attention: Tensor, counted_BL: Tensor) -> float:
    rows = [((m - a)[c] ** 2).sum() / (a[c] ** 2).sum() for m, a, c in zip(mine, attention, counted_BL, strict=True)]
    return mean_of_rows(torch.stack(rows), counted_BL)


def test_layers_come_nearer_and_so_does_the_model(aligned, models, tmp_path):
    assert run(aligned(**SETTINGS, max_steps=60)) == 0
    rows = metrics(tmp_path / "run")
    layers = [key for key in rows[0] if key.startswith("loss_layer_")]
    assert layers == [f"loss_layer_{i}" for i in load_model(models / "hybrid").config.mixer_layers]
    assert all(rows[-1][key] < 0.9 * rows[0][key] for key in layers)
    for row in rows:
        assert row["loss"] == pytest.approx(sum(row[key] for key in layers) / len(layers), rel=1e-5)
    before, after = compare(
        models / "teacher", [str(models / "hybrid"), str(tmp_path / "run" / "hybrid")], models / "text.jsonl",
        tokens=2048, length=128,
    ).values()  # fmt: skip
    assert after.kl < 0.95 * before.kl
    start_weights, weights = (
        load_file(p / "model.safetensors") for p in (models / "hybrid", tmp_path / "run" / "hybrid")
    )
    changed = {name for name, weight in weights.items() if not torch.equal(weight, start_weights[name])}
    assert changed and all(".mixer." in name for name in changed)


def test_the_loss_is_the_relative_error_of_each_mixer_on_the_teachers_input(aligned, models, tmp_path):
    tokens, docs, labels = first_rows(aligned())
    student, teacher = (load_model(models / name) for name in ("hybrid", "teacher"))
    seen = {}
    for i in student.config.mixer_layers:
        teacher.model.layers[i].self_attn.register_forward_hook(
            lambda _, inputs, output, i=i: seen.update({i: (*inputs, output)})
        )
    with torch.no_grad():
        teacher.model(tokens, document_ids=docs)
        expected = {}
        for i, (u, batch, attention) in seen.items():
            mine = student.model.layers[i].mixer(u, batch.cos, batch.sin, batch.doc_BL)
            expected[f"loss_layer_{i}"] = relative_square(mine, attention, labels != -100)
    assert run(aligned(max_steps=1)) == 0
    (row,) = metrics(tmp_path / "run")
    assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-4)


def test_on_the_students_inputs_the_target_is_the_attention_on_them(aligned, models, tmp_path):
    tokens, docs, labels = first_rows(aligned())
    student, teacher = (load_model(models / name) for name in ("hybrid", "teacher"))
    expected = {}

    def look(i, inputs, output):
        (u, cos, sin, doc_BL, *_), mask = inputs, student.model._mask(tokens.shape[1], 0, None, docs, "cpu")
        attention = teacher.model.layers[i].self_attn(u, Batch(cos, sin, mask, doc_BL))
        expected[f"loss_layer_{i}"] = relative_square(output, attention, labels != -100)

    for i in student.config.mixer_layers:
        student.model.layers[i].mixer.register_forward_hook(lambda _, inputs, output, i=i: look(i, inputs, output))
    with torch.no_grad():
        student.model(tokens, document_ids=docs)
    one = aligned(**SETTINGS, max_steps=60, inputs="student")
    one.dataset.max_seq_len = 48
    assert run(one) == 0
    rows = metrics(tmp_path / "run")
    assert {key: rows[0][key] for key in expected} == pytest.approx(expected, rel=1e-4)
    assert all(rows[-1][key] < 0.9 * rows[0][key] for key in expected)


def test_the_attentions_matrices_are_learnt(aligned, overrides, models, tmp_path):
    """The first loss is that of matrices made one number after another, the error falls, one process is two."""
    passages = [json.loads(line)["text"][:30] for line in (models / "text.jsonl").read_text().splitlines()[:3]]
    (text := tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in passages))
    settings = {"target": "matrices", "dataset.source": str(text), "batch_size": 2, "mixer_lr": 3e-3}
    tokens, docs, labels = first_rows(aligned(**settings))  # the two rows of every step
    assert docs.max(1).values.min() > 0
    student, teacher = (load_model(models / name) for name in ("hybrid", "teacher"))
    seen = {}
    for i in student.config.mixer_layers:
        teacher.model.layers[i].self_attn.register_forward_hook(lambda _, inputs, o, i=i: seen.update({i: inputs}))
    with torch.no_grad():
        teacher.model(tokens, document_ids=docs)
        expected = {}
        for i, (u, batch) in seen.items():
            mixer, attention = student.model.layers[i].mixer, teacher.model.layers[i].self_attn
            M = mixer_matrices(mixer.core, *mixer.project(u), batch.cos, batch.sin, docs)
            A = attention_matrices(*attention.queries_and_keys(u, batch), docs)
            expected[f"loss_layer_{i}"] = mean_of_rows(relative(M, A, labels != -100), labels != -100)
    assert run(aligned(**settings)) == 0
    rows = metrics(tmp_path / "run")
    assert {key: rows[0][key] for key in expected} == pytest.approx(expected, rel=1e-4)
    assert all(rows[-1][key] < 0.85 * rows[0][key] for key in expected)
    before, after = (load_file(p / "model.safetensors") for p in (models / "hybrid", tmp_path / "run" / "hybrid"))
    moved = {name.split(".", 4)[4] for name in after if not torch.equal(after[name], before[name])}
    assert moved >= {"q_proj.weight", "k_proj.weight", "z_proj.weight", "dt_proj.weight", "core.A_log"}
    assert not moved & {"v_proj.weight", "o_proj.weight"}

    settings["inputs"] = "student"
    assert run(aligned(**settings, output_dir=str(tmp_path / "one"))) == 0
    words = overrides(**settings | {"batch_size": 1}, output_dir=str(tmp_path / "two"))
    forked("align_hybrid", 2, {k: v for k, v in words.items() if k not in UNKNOWN}, without=LEFT_OUT)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for row, other in zip(one, two, strict=True):
        for key in ("loss", *expected, "tokens"):
            assert other[key] == pytest.approx(row[key], rel=1e-4)
        # of a state that says next to nothing the norm makes a direction of rounding errors
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-3)


def test_one_process_and_two_have_the_same_losses_and_a_run_goes_on(aligned, overrides, tmp_path):
    assert run(aligned(output_dir=str(tmp_path / "one"))) == 0
    words = overrides(output_dir=str(tmp_path / "two"), batch_size=2, checkpoint_every_n_steps=4, keep_last_n=0)
    words = {k: v for k, v in words.items() if k not in UNKNOWN}
    two = start(words, "--nproc_per_node", "2", recipe="align_hybrid", without=LEFT_OUT)
    _, err = two.communicate(timeout=300)
    assert two.returncode == 0, err
    a, b = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(a) == len(b) == 10
    for row, other in zip(a, b, strict=True):
        for key in [key for key in row if key.startswith("loss")] + ["grad_norm", "lr_mixer", "tokens"]:
            assert other[key] == pytest.approx(row[key], rel=1e-4, abs=1e-5)
    # one goes on where two stopped
    assert run(aligned(output_dir=branch(tmp_path / "two", 4, tmp_path / "one_of_two"))) == 0
    for row, other in zip(metrics(tmp_path / "one_of_two"), b, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=0, abs=1e-5)
    # stopped after four of the ten steps
    out = str(tmp_path / "parts")
    recipe = AlignHybrid(aligned(output_dir=out))
    recipe.setup()
    stop_after(recipe, 4)
    assert run(aligned(output_dir=out)) == 0
    parts, whole = (load_file(tmp_path / name / "hybrid" / "model.safetensors") for name in ("parts", "one"))
    assert all(torch.equal(parts[name], weight) for name, weight in whole.items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rest_lr": 1e-4}, "unknown config key rest_lr"),
        ({"mixer_lr": -1}, "mixer_lr -1"),
        ({"inputs": "both"}, "inputs 'both' is none of teacher, student"),
        ({"target": "both"}, "target 'both' is none of outputs, matrices"),
        ({"target": "matrices", "student": "conv"}, "have a short convolution (short_conv 4)"),
        ({"teacher": "hybrid"}, "it has mixers too"),
        ({"student": "cut"}, "num_hidden_layers"),
    ],
)
def test_refused(aligned, models, tmp_path, capsys, changes, words):
    if changes.get("teacher"):
        changes = {"teacher": str(models / "hybrid")}
    if changes.get("student") == "cut":
        cut(models / "hybrid", tmp_path / "cut", layers=1)
    if changes.get("student") == "conv":
        mixer = {"window": 0, "short_conv": 4}
        convert(Conversion(str(models / "teacher"), str(tmp_path / "conv"), mixer=mixer))
    if changes.get("student"):
        changes |= {"student": str(tmp_path / changes["student"])}
    cfg = aligned()
    for key, value in changes.items():
        cfg[key] = value
    assert run(cfg) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and words in errors[0], errors
    assert not (tmp_path / "run" / "hybrid").exists()
