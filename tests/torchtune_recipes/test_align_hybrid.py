import pytest
import torch
from safetensors.torch import load_file

from mamba_hybrid.checkpoint import load_model
from mamba_hybrid.compare import compare
from mamba_hybrid.draft import cut
from mamba_hybrid.model import Batch
from torchtune_recipes.align_hybrid import AlignHybrid, run

from .conftest import branch, metrics, start, stop_after

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
    recipe = AlignHybrid(aligned())
    recipe.setup()
    tokens, docs, labels = recipe.data.batch(recipe.order.step_rows(0).ravel())
    recipe.cleanup()
    student, teacher = (load_model(models / name) for name in ("hybrid", "teacher"))
    seen = {}
    for i in student.config.mixer_layers:
        teacher.model.layers[i].self_attn.register_forward_hook(
            lambda _, inputs, output, i=i: seen.update({i: (*inputs, output)})
        )
    counted = (labels != -100)[..., None]
    with torch.no_grad():
        teacher.model(tokens, document_ids=docs)
        expected = {}
        for i, (u, batch, attention) in seen.items():
            mine = student.model.layers[i].mixer(u, batch.cos, batch.sin, batch.doc_BL)
            rows = [
                ((m - a)[c[:, 0]] ** 2).sum() / (a[c[:, 0]] ** 2).sum() * c.sum()
                for m, a, c in zip(mine, attention, counted, strict=True)
            ]
            expected[f"loss_layer_{i}"] = float(sum(rows) / counted.sum())
    assert run(aligned(max_steps=1)) == 0
    (row,) = metrics(tmp_path / "run")
    assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-4)


def test_on_the_students_inputs_the_target_is_the_attention_on_them(aligned, models, tmp_path):
    recipe = AlignHybrid(aligned())
    recipe.setup()
    tokens, docs, labels = recipe.data.batch(recipe.order.step_rows(0).ravel())
    recipe.cleanup()
    student, teacher = (load_model(models / name) for name in ("hybrid", "teacher"))
    counted, expected = labels != -100, {}

    def look(i, inputs, output):
        (u, cos, sin, doc_BL, *_), mask = inputs, student.model._mask(tokens.shape[1], 0, None, docs, "cpu")
        attention = teacher.model.layers[i].self_attn(u, Batch(cos, sin, mask, doc_BL))
        rows = [
            ((m - a)[c] ** 2).sum() / (a[c] ** 2).sum() * c.sum()
            for m, a, c in zip(output, attention, counted, strict=True)
        ]
        expected[f"loss_layer_{i}"] = float(sum(rows) / counted.sum())

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
        ({"teacher": "hybrid"}, "it has mixers too"),
        ({"student": "cut"}, "num_hidden_layers"),
    ],
)
def test_refused(aligned, models, tmp_path, capsys, changes, words):
    if changes.get("teacher"):
        changes = {"teacher": str(models / "hybrid")}
    if changes.get("student"):
        cut(models / "hybrid", tmp_path / "cut", layers=1)
        changes = {"student": str(tmp_path / "cut")}
    cfg = aligned()
    for key, value in changes.items():
        cfg[key] = value
    assert run(cfg) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and words in errors[0], errors
    assert not (tmp_path / "run" / "hybrid").exists()
