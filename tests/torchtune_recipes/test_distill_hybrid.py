import os
import shutil
import signal
import time

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from mamba_hybrid.checkpoint import load_model, save_model
from mamba_hybrid.compare import compare
from mamba_hybrid.draft import cut
from mamba_hybrid.errors import UserError
from mamba_hybrid.flops import distillation_flops
from tests.tiny import save_transformer
from torchtune_recipes.distill_hybrid import DistillHybrid, main, run
from torchtune_recipes.models import PARTS
from torchtune_recipes.recipe import component, override

from .conftest import CONFIG, branch, metrics, start

SAME = ("step", "loss", "kl", "ce", "agreement", "tokens", "grad_norm", "lr_mixer", "lr_rest", "epoch")


def same(rows):
    return [{key: row[key] for key in SAME} for row in rows]


def ready(cfg) -> DistillHybrid:
    recipe = DistillHybrid(cfg)
    recipe.setup()
    return recipe


def test_it_learns_and_the_result_is_a_checkpoint(config, models, tmp_path):
    settings = {"max_steps": 40, "mixer_lr": 3e-3, "rest_lr": 1e-3, "dataset.max_seq_len": 128}
    assert run(config(**settings)) == 0
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 41))
    before, after = compare(
        models / "teacher", [str(models / "hybrid"), str(tmp_path / "run" / "hybrid")], models / "text.jsonl",
        tokens=2048, length=128,
    ).values()  # fmt: skip
    assert after.kl < 0.8 * before.kl
    # again: nothing is left to do, nothing changes
    state = (tmp_path / "run" / "hybrid" / "model.safetensors").read_bytes()
    assert run(config(**settings)) == 0
    assert metrics(tmp_path / "run") == rows
    assert (tmp_path / "run" / "hybrid" / "model.safetensors").read_bytes() == state


def test_a_drafter_learns_from_its_target(config, models, tmp_path):
    """Teacher and student of different depth, the teacher a hybrid."""
    kept = cut(models / "hybrid", tmp_path / "draft", layers=1)
    assert (
        len(load_model(tmp_path / "draft").model.layers) == len(kept) < len(load_model(models / "hybrid").model.layers)
    )
    parts = {"student": str(tmp_path / "draft"), "teacher": str(models / "hybrid")}
    assert run(config(**parts, max_steps=40, mixer_lr=3e-3, rest_lr=3e-3)) == 0
    rows = metrics(tmp_path / "run")
    assert rows[-1]["kl"] < 0.6 * rows[0]["kl"]
    assert rows[-1]["agreement"] > rows[0]["agreement"]


def test_metrics_are_means_over_the_tokens_with_a_label(config, models, tmp_path):
    recipe = ready(config(gradient_accumulation_steps=2))
    _, docs, labels = batch = recipe.data.batch(recipe.order.step_rows(0).ravel())
    recipe.cleanup()
    student, teacher = (load_model(models / name) for name in ("hybrid", "teacher"))
    with torch.no_grad():
        p, q = (m(batch.tokens, document_ids=docs).logits.log_softmax(-1) for m in (teacher, student))
    counted = labels != -100
    assert run(config(gradient_accumulation_steps=2, max_steps=1, **{"loss.ce_weight": 0.3})) == 0
    (row,) = metrics(tmp_path / "run")
    kl = float((p.exp() * (p - q)).sum(-1)[counted].mean())
    ce = float(-q[counted].gather(-1, labels[counted][:, None]).mean())
    assert row["kl"] == pytest.approx(kl, rel=1e-4)
    assert row["ce"] == pytest.approx(ce, rel=1e-4)
    assert row["loss"] == pytest.approx(kl + 0.3 * ce, rel=1e-4)
    assert row["agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1))[counted].float().mean()))
    assert row["tokens"] == int(counted.sum())


@pytest.mark.parametrize("divergence", ["reverse", "skewed", "js"])
def test_other_divergences_bring_the_student_nearer(config, tmp_path, divergence):
    assert run(config(max_steps=15, mixer_lr=3e-3, rest_lr=1e-3, **{"loss.divergence": divergence})) == 0
    rows = metrics(tmp_path / "run")
    for name in ("loss", "kl"):
        assert rows[-1][name] < 0.9 * rows[0][name]
    assert rows[0]["loss"] != rows[0]["kl"]  # which stays KL(teacher || student)


def test_one_process_and_two_have_the_same_losses(overrides, config, tmp_path):
    # the second from elsewhere, where only the installed package is
    one = start(overrides(output_dir=str(tmp_path / "one")))
    saved = {"checkpoint_every_n_steps": 4, "keep_last_n": 0}
    words = overrides(output_dir=str(tmp_path / "two"), batch_size=2, **saved)
    two = start(words, "--nproc_per_node", "2", cwd=tmp_path)
    for process in (one, two):
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    a, b = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(a) == len(b) == 10
    for row, other in zip(a, b, strict=True):
        for key in SAME:
            assert other[key] == pytest.approx(row[key], rel=1e-4, abs=1e-4)
    weights, others = (load_file(tmp_path / run / "hybrid" / "model.safetensors") for run in ("one", "two"))
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-3, atol=1e-4)
    # one goes on where two stopped
    assert run(config(output_dir=branch(tmp_path / "two", 4, tmp_path / "parts"))) == 0
    parts = metrics(tmp_path / "parts")
    assert parts[:4] == b[:4] and len(parts) == 10
    for row, other in zip(parts, b, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=0, abs=1e-5)


def test_terminated_process_stops_with_a_checkpoint_and_goes_on(overrides, config, tmp_path):
    settings = dict(max_steps=400, log_every=7)
    out = tmp_path / "stopped"
    process = start(overrides(output_dir=str(out), **settings))
    deadline = time.monotonic() + 200
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    said, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped at step" in said, err
    (checkpoint,) = out.glob("step_*")
    step = int(checkpoint.name.removeprefix("step_"))
    assert [row["step"] for row in metrics(out)] == list(range(1, step + 1)) and step < 400
    fewer = ready(config(output_dir=str(out), **settings))
    try:
        assert fewer.step == step
        resumed, rates = fewer.train_step()
    finally:
        fewer.cleanup()
    straight = ready(config(output_dir=str(tmp_path / "straight"), **settings))
    try:
        for straight.step in range(step + 1):
            expected, expected_rates = straight.train_step()
    finally:
        straight.cleanup()
    assert torch.equal(resumed, expected) and rates == expected_rates


def test_rows_that_reach_no_state_can_be_resumed(config, tmp_path):
    """No row is longer than the window, so decay and step sizes get no gradient."""
    settings = {"dataset.max_seq_len": 8, "max_steps": 4, "checkpoint_every_n_steps": 2, "keep_last_n": 0}
    assert run(config(output_dir=str(tmp_path / "whole"), **settings)) == 0
    assert run(config(output_dir=branch(tmp_path / "whole", 2, tmp_path / "parts"), **settings)) == 0
    parts, whole = metrics(tmp_path / "parts"), metrics(tmp_path / "whole")
    assert [[row[key] for key in SAME] for row in parts] == [[row[key] for key in SAME] for row in whole]


def test_one_process_stops_and_two_go_on(overrides, config, tmp_path):
    assert run(config(output_dir=str(tmp_path / "whole"), max_steps=8)) == 0
    recipe = ready(config(max_steps=8))
    for recipe.step in range(4):
        recipe._unread.append(recipe.train_step())
    recipe.step = 4
    recipe.save_checkpoint()
    recipe.cleanup()
    process = start(overrides(max_steps=8, batch_size=2), "--nproc_per_node", "2")
    said, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "resuming after step 4 of 8" in said, err
    rows, expected = metrics(tmp_path / "run"), metrics(tmp_path / "whole")
    assert [row["step"] for row in rows] == list(range(1, 9))
    for row, other in zip(rows, expected, strict=True):
        for key in SAME:
            assert row[key] == pytest.approx(other[key], rel=1e-4, abs=1e-4)
    assert same(rows[:4]) == same(expected[:4])


def test_signals_are_handed_back(config):
    before = signal.getsignal(signal.SIGTERM)
    recipe = ready(config())
    os.kill(os.getpid(), signal.SIGTERM)
    assert recipe.stopped
    recipe.cleanup()
    assert signal.getsignal(signal.SIGTERM) is before


def test_accumulation_is_a_larger_batch(config):
    got = []
    for batch, accumulate in ((4, 1), (2, 2), (1, 4)):
        recipe = ready(config(batch_size=batch, gradient_accumulation_steps=accumulate))
        sums, _ = recipe.train_step()
        got.append((sums, [p.detach().clone() for p in recipe.student.parameters()]))
        recipe.cleanup()
    for sums, weights in got[1:]:
        torch.testing.assert_close(sums, got[0][0], rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(weights, got[0][1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)  # Adam's first step: sign-like


@pytest.mark.parametrize("part", PARTS)
def test_frozen_parts_stay_and_others_move(config, tmp_path, models, part):
    assert run(config(freeze=[part], max_steps=3)) == 0
    before = load_model(models / "hybrid").state_dict()
    after = load_model(tmp_path / "run" / "hybrid").state_dict()
    frozen = {name for name in before if any(mark in name for mark in PARTS[part])}
    assert frozen
    for name, weight in before.items():
        if name in frozen:
            assert torch.equal(after[name], weight), name
        elif weight.numel() > 16:  # of tiny ones none may have a gradient
            assert not torch.equal(after[name], weight), name


def test_parameter_groups(config):
    recipe = ready(config(**{"optimizer.weight_decay": 0.1, "mixer_lr": 0.02, "rest_lr": 0.01, "lr_scheduler": None}))
    names = {p: name for name, p in recipe.student.named_parameters()}
    groups = {(g["name"], g["weight_decay"]): {names[p] for p in g["params"]} for g in recipe.optimizer.param_groups}
    assert set(groups) == {("mixer", 0.1), ("mixer", 0.0), ("rest", 0.1), ("rest", 0.0)}
    assert sorted(n for g in groups.values() for n in g) == sorted(names.values())
    for (kind, decay), members in groups.items():
        for name in members:
            assert (".mixer." in name) == (kind == "mixer")
            assert (".core." in name or "norm" in name) == (decay == 0)
    assert {(g["name"], g["lr"]) for g in recipe.optimizer.param_groups} == {("mixer", 0.02), ("rest", 0.01)}
    _, rates = recipe.train_step()
    recipe.cleanup()
    assert rates == {"lr_mixer": 0.02, "lr_rest": 0.01}


def test_no_schedule_from_the_command_line(config):
    """torchtune reads it as the path of the component, and takes no ~lr_scheduler."""
    recipe = ready(override(config(), ["lr_scheduler=null"]))
    assert recipe.scheduler is None
    recipe.cleanup()


def test_schedule_warms_up_and_ends_above_zero(config, tmp_path):
    assert run(config(max_steps=6, mixer_lr=0.001, rest_lr=0.001)) == 0
    rates = [row["lr_mixer"] for row in metrics(tmp_path / "run")]
    assert rates[:2] == [pytest.approx(0.0005), pytest.approx(0.001)]
    assert rates[1:] == sorted(rates[1:], reverse=True) and 0 < rates[-1] < 0.0002
    assert [row["lr_rest"] for row in metrics(tmp_path / "run")] == rates


def test_packed_rows_give_the_logits_of_the_documents_alone(config, models):
    recipe = ready(config(**{"dataset.max_seq_len": 200}))
    packed = recipe.data.batch(recipe.order.step_rows(0).ravel()[:2])
    recipe.cleanup()
    assert packed.documents[0].max() > 0
    for path in ("hybrid", "teacher"):
        model = load_model(models / path)
        with torch.no_grad():
            together = model(packed.tokens, document_ids=packed.documents).logits
            for row in range(2):
                for d in packed.documents[row].unique():
                    here = packed.documents[row] == d
                    alone = model(packed.tokens[row, here][None]).logits[0]
                    torch.testing.assert_close(together[row, here], alone, rtol=1e-5, atol=1e-5)


def test_recomputed_activations_and_bf16(config, models, tmp_path):
    losses = {}
    for kind, more in {
        "plain": {},
        "recomputed": {"enable_activation_checkpointing": True},
        "bf16": {"dtype": "bf16"},
    }.items():
        assert run(config(output_dir=str(tmp_path / kind), max_steps=4, **more)) == 0
        losses[kind] = torch.tensor([row["loss"] for row in metrics(tmp_path / kind)])
    assert torch.equal(losses["recomputed"], losses["plain"])
    torch.testing.assert_close(losses["bf16"], losses["plain"], rtol=0.1, atol=0.01)
    assert not torch.equal(losses["bf16"], losses["plain"])
    # masters are fp32 in both: small steps are not rounded away
    weights = load_file(tmp_path / "bf16" / "hybrid" / "model.safetensors")
    name = "model.layers.0.mixer.q_proj.weight"
    assert weights[name].dtype == torch.float32
    assert not torch.equal(weights[name], weights[name].bfloat16().float())


def test_cores_stay_fp32_in_a_bf16_checkpoint(config, models, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(models / "hybrid", half)
    model = load_model(models / "hybrid")
    tensors = ((n, t if ".core." in n else t.bfloat16()) for n, t in model.state_dict().items())
    save_model(half, model.config, tensors, models / "hybrid", overwrite=True)
    recipe = ready(config(student=str(half), max_steps=3, dtype="bf16"))
    assert {p.dtype for p in recipe.student.parameters()} == {torch.float32}
    assert {p.dtype for p in recipe.teacher.parameters()} == {torch.bfloat16}
    recipe.cleanup()
    assert run(config(student=str(half), max_steps=3, dtype="bf16")) == 0
    weights = load_file(tmp_path / "run" / "hybrid" / "model.safetensors")
    assert weights["model.layers.0.mixer.q_proj.weight"].dtype == torch.bfloat16
    core = weights["model.layers.0.mixer.core.near_weight"]
    assert core.dtype == torch.float32 and not torch.equal(core, core.bfloat16().float())


def test_interrupted_then_other_settings_are_refused(config, capsys, tmp_path):
    assert run(config(max_steps=3)) == 0
    for more, says in {
        ("batch_size", 2): "rows a step",
        ("max_steps", 5): "steps",
        ("mixer_lr", 1.0): "mixer_lr",
        ("freeze", ("mlp",)): "freeze",
        ("dataset.max_seq_len", 40): "data",
        ("resume", False): "resume=True goes on",
    }.items():
        key, value = more
        assert run(config(**{"max_steps": 3, key: list(value) if isinstance(value, tuple) else value})) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and says in error
    (tmp_path / "run" / "step_3" / "__0_0.distcp").write_bytes(b"rubbish")
    assert run(config(max_steps=3)) == 1
    assert "step_3 is damaged" in capsys.readouterr().err


def test_numbers_that_are_not_finite_stop_the_run(config, capsys, tmp_path):
    assert run(config(mixer_lr=1e30, rest_lr=1e30, checkpoint_every_n_steps=2, log_every=5, max_steps=10)) == 1
    error = capsys.readouterr().err
    assert "error: step " in error and "lower mixer_lr" in error
    steps = [row["step"] for row in metrics(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) < 5
    assert not (tmp_path / "run" / "hybrid").exists()
    assert all(int(p.name.removeprefix("step_")) <= len(steps) for p in (tmp_path / "run").glob("step_*"))


LOGGER = "torchtune_recipes.metrics.JSONLLogger"
BAD = {
    "no teacher": ({"teacher": "/nowhere"}, "/nowhere"),
    "no student": ({"student": "/nowhere"}, "/nowhere"),
    "column": ({"dataset.column": "body"}, r"line 1 has no column 'body', only ['text']"),
    "file": ({"dataset.source": "/nowhere.jsonl"}, "/nowhere.jsonl does not exist"),
    "freeze": ({"freeze": ["mpl"]}, "freeze names ['mpl']; there are embeddings"),
    "all frozen": ({"freeze": list(PARTS)}, "leaves nothing to train"),
    "too many rows": ({"batch_size": 4000}, "a step takes 4000 (batch_size 4000"),
    "batch": ({"batch_size": 0}, "batch_size 0 must be a whole number above 0"),
    "checkpoints": ({"checkpoint_every_n_steps": -5}, "checkpoint_every_n_steps -5"),
    "steps": ({"max_steps": None}, "max_steps or epochs"),
    "rate": ({"mixer_lr": -1.0}, "mixer_lr -1.0"),
    "seed": ({"seed": "one"}, "seed 'one'"),
    "switch": ({"compile": "maybe"}, "compile 'maybe' must be True or False"),
    "optimizer": ({"optimizer._component_": "torch.optim.Adm"}, "module 'torch.optim'"),
    "metrics": ({"metric_loggers": [{"_component_": LOGGER, "path": "/dev/null/m.jsonl"}]}, "/dev/null/m.jsonl cannot"),
    "dtype": ({"dtype": "fp8"}, "dtype 'fp8' is none of fp32, bf16"),
    "device": ({"device": "tpu"}, "device 'tpu' is not here"),
    "length": ({"dataset.max_seq_len": 100_000}, "over the models' context"),
    "short rows": ({"dataset.max_seq_len": 1}, "max_seq_len 1 must be at least 2"),
    "typing error": ({"mixer_rl": 0.1}, "unknown config key mixer_rl"),
    "chunk": ({"sequence_chunk": 0}, "sequence_chunk 0 must be a whole number above 0"),
    "short chunk": ({"sequence_chunk": 7}, "sequence_chunk 7 must be at least 8"),
    "loss key": ({"loss.klweight": 0.1}, "unknown config key loss.klweight"),
    "loss weights": ({"loss.kl_weight": 0.0}, "one must be above 0"),
    "temperature": ({"loss.temperature": 0.0}, "loss.temperature 0.0 must be above 0"),
    "divergence": ({"loss.divergence": "kl"}, "loss.divergence 'kl' is none of forward, reverse, skewed, js"),
    "skew": ({"loss.divergence": "skewed", "loss.skew": 1.5}, "loss.skew 1.5 must be between 0 and 1"),
    "skew of another": ({"loss.skew": 0.1}, "loss.skew 0.1 belongs to loss.divergence skewed, not forward"),
    "component": ({"optimizer._component_": "torch.optim.Adamw"}, "optimizer: torch.optim.Adamw"),
    "component's argument": ({"dataset.colum": "x"}, "'colum'"),
    "interpolation": ({"output_dir": "${nothing}"}, "nothing"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case, config, capsys, tmp_path):
    more, says = BAD[case]
    assert run(config(**more)) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and says in errors[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "says", "code"),
    [
        (["--config", "/nowhere.yaml"], "No such file or directory: '/nowhere.yaml'", 1),
        (["--config", str(CONFIG), "batch_size"], "key=value, got batch_size", 1),
        (["--config", str(CONFIG), "max_steps=["], "parsing a flow node", 1),
        (["--config", str(CONFIG), "--batch_size", "3"], "['--batch_size']", 1),
        (["--config", str(CONFIG), "batch_size=0"], "batch_size 0", 1),
        ([], "required: --config", 2),
        (["--help"], "", 0),
    ],
)
def test_command_lines(words, says, code, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["distill_hybrid", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    err = capsys.readouterr().err
    assert (
        ended.value.code == code and says in err and (code != 1 or (err.startswith("error: ") and err.count("\n") == 1))
    )


def test_other_vocabularies_are_refused(config, capsys, tmp_path, models):
    save_transformer(tmp_path / "bigger", "tied", vocab_size=300)
    assert run(config(teacher=str(tmp_path / "bigger"))) == 1
    assert "300" in capsys.readouterr().err
    shutil.copytree(models / "teacher", tmp_path / "renumbered")
    file = tmp_path / "renumbered" / "tokenizer.json"
    text = file.read_text()
    file.write_text(text.replace('"a"', '"\x00"').replace('"b"', '"a"').replace('"\x00"', '"b"'))
    assert run(config(teacher=str(tmp_path / "renumbered"))) == 1
    assert "differ" in capsys.readouterr().err


def test_the_command_says_what_is_wrong_and_exits_with_1(overrides, tmp_path):
    process = start(overrides(teacher="/nowhere"))
    said, err = process.communicate(timeout=200)
    assert process.returncode == 1
    assert [line for line in err.splitlines() if "error" in line.lower()] == [err.strip().splitlines()[-1]]
    assert err.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_truncated_student(config, capsys, models, tmp_path):
    shutil.copytree(models / "hybrid", tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert run(config(student=str(tmp_path / "cut"))) == 1
    assert str(tmp_path / "cut") in capsys.readouterr().err


def test_component_of_something_else():
    with pytest.raises(UserError, match="dataset needs a _component_"):
        component("dataset", "text")
    with pytest.raises(UserError, match="must be a dotted path, it is None"):
        component("optimizer", OmegaConf.create({"_component_": None}))


def test_gradient_norms_of_the_parts(config, models, tmp_path):
    """Against autograd on the model alone; clipping keeps to the norm of all."""
    recipe = ready(config())
    rows = recipe.order.step_rows(0).ravel()
    tokens, docs, labels = recipe.data.batch(rows)
    recipe.cleanup()
    student, teacher = (load_model(models / name) for name in ("hybrid", "teacher"))
    with torch.no_grad():
        p = teacher(tokens, document_ids=docs).logits.log_softmax(-1)
    q = student(tokens, document_ids=docs).logits.log_softmax(-1)
    (p.exp() * (p - q)).sum(-1)[labels != -100].mean().backward()
    assert run(config(max_steps=1)) == 0
    (row,) = metrics(tmp_path / "run")
    squares = {part: 0.0 for part in PARTS}
    for name, w in student.named_parameters():
        part = "mixers" if ".mixer." in name else next(k for k, marks in PARTS.items() if any(m in name for m in marks))
        squares[part] += float(w.grad.square().sum())
    for part, square in squares.items():
        assert row[f"grad_norm_{part}"] == pytest.approx(square**0.5, rel=1e-4)
    assert row["grad_norm"] == pytest.approx(sum(squares.values()) ** 0.5, rel=1e-4)


def test_clipping_keeps_to_the_limit(config):
    cfg = config(clip_grad_norm=0.01, lr_scheduler=None, mixer_lr=1.0, rest_lr=1.0)
    cfg.optimizer = {"_component_": "torch.optim.SGD"}
    recipe = ready(cfg)
    before = [p.detach().clone() for p in recipe.student.parameters()]
    row, _ = recipe.train_step()
    moved = sum((p.detach() - b).square().sum() for p, b in zip(recipe.student.parameters(), before, strict=True))
    recipe.cleanup()
    assert row[-1] > 0.01 and float(moved) ** 0.5 == pytest.approx(0.01, rel=1e-3)


def test_tflops_and_mfu(config, models, tmp_path):
    assert run(config(max_steps=1, peak_tflops=0.5)) == 0
    (row,) = metrics(tmp_path / "run")
    student, teacher = (load_model(models / name).config for name in ("hybrid", "teacher"))
    assert row["tflops"] * 1e12 == pytest.approx(distillation_flops(student, teacher, 48) * row["tokens_per_s"])
    assert row["mfu"] == pytest.approx(row["tflops"] / 0.5)
    assert run(config(max_steps=1, output_dir=str(tmp_path / "unknown"))) == 0
    (row,) = metrics(tmp_path / "unknown")
    assert "tflops" in row and "mfu" not in row  # nobody knows a CPU's peak
