"""Pipelines: a real one with an interruption, what is recorded, and what is refused before anything runs."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import yaml

from mamba_hybrid.checkpoint import load_config
from mamba_hybrid.cli import main
from mamba_hybrid.errors import UserError
from mamba_hybrid.pipeline import RECORD, Record, load, run
from tests.tiny import save_text, save_transformer

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "smollm2_135m_cpu.yaml"
CONVERT = "convert ${teacher} ${output_dir}/start --calibrate ${text} --calibrate-tokens 1024 --calibrate-length 128"


@pytest.fixture
def steps() -> list[dict]:
    overrides = {
        "student": "${output_dir}/start",
        "teacher": "${teacher}",
        "dataset.source": "${text}",
        "dataset.max_seq_len": 48,
        "batch_size": 4,
        "max_steps": 80,
        "mixer_lr": 1e-05,
        "freeze": [],
        "output_dir": "${output_dir}/distil",
    }
    return [
        {"name": "convert", "command": CONVERT + " --window 8 --overwrite"},
        {"name": "distil", "recipe": "distill_hybrid", "config": str(CONFIG), "overrides": overrides},
    ]


@pytest.fixture
def write(tmp_path, steps):
    """A pipeline's file; its models and text lie in a directory with a blank in its name."""
    home = tmp_path / "a home"
    home.mkdir()

    def make(**more) -> Path:
        data = {
            "name": "tiny",
            "output_dir": str(home / "run"),
            "teacher": str(home / "teacher"),
            "text": str(home / "text.jsonl"),
            "steps": steps,
        } | more
        path = tmp_path / "pipeline.yaml"
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return path

    return make


def record(home: Path, steps, begun=None) -> None:
    """As if these steps had been done."""
    (home / "run").mkdir(parents=True, exist_ok=True)
    done = [{"step": step.name, "digest": step.digest, "seconds": 1.0} for step in steps]
    Record(home / "run" / RECORD, done, begun).write("tiny")


def test_stopped_in_a_step_it_goes_on_there(write, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    home = tmp_path / "a home"
    save_transformer(home / "teacher", "tied")
    save_text(home / "text.jsonl")
    path, metrics = write(), home / "run" / "distil" / "metrics.jsonl"
    refused = []

    def interrupt() -> None:
        deadline = time.monotonic() + 200
        while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            run(path)
        except UserError as e:
            refused.append(str(e))
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    watcher = threading.Thread(target=interrupt)
    watcher.start()
    assert main(["run", str(path)]) == 130
    watcher.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert refused and "a step of this pipeline is running" in refused[0]
    out, _ = capfd.readouterr()
    assert "stopped in step distil (2 of 2)" in out and "stopped at step" in out  # ours, and the recipe's own
    assert load_config(home / "run" / "start").mixer_layers == [0, 2]
    stopped = len(metrics.read_text().splitlines())
    state = json.loads((home / "run" / RECORD).read_text())
    assert [row["step"] for row in state["done"]] == ["convert"] and state["begun"] == "distil"
    # a rerun does not convert again, and the recipe goes on after its last step
    weights = (home / "run" / "start" / "model.safetensors").stat().st_mtime_ns
    assert 0 < stopped < 80 and main(["run", str(path)]) == 0
    out, _ = capfd.readouterr()
    assert f"resuming after step {stopped} of 80" in out and "== step convert" not in out
    assert (home / "run" / "start" / "model.safetensors").stat().st_mtime_ns == weights
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, 81))
    assert load_config(home / "run" / "distil" / "hybrid").mixer_layers == [0, 2]
    # and a third starts nothing
    assert main(["run", str(path)]) == 0
    out, _ = capfd.readouterr()
    assert out == f"finished tiny: 2 steps, {home / 'run' / RECORD}\n"


def test_dry_run_prints_what_a_user_would_type(write, tmp_path, capsys, steps):
    steps[1]["processes"] = 2
    path = write()
    assert main(["run", str(path), "--dry-run", f"teacher={tmp_path}/other"]) == 0
    _, first, _, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"mamba-hybrid convert {tmp_path}/other '{tmp_path}/a home/run/start' --calibrate ")
    assert second.startswith(f"tune run --nproc_per_node 2 distill_hybrid --config {CONFIG} ")
    assert " freeze=[] " in f"{second} ".replace("'", "") and "mixer_lr=1e-05" in second
    assert not (tmp_path / "a home" / "run").exists()
    record(tmp_path / "a home", load(path).steps[:1])
    assert main(["run", str(path), "--dry-run"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("#")] == [
        "# 1 convert (done)",
        "# 2 distil",
    ]


@pytest.mark.parametrize(("code", "words"), [(1, "ended with exit code 1"), (-9, "was ended by SIGKILL")])
def test_a_step_that_fails_is_named_and_not_recorded(code, words, write, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mamba_hybrid.pipeline.Signals.run", lambda *_: code)
    assert main(["run", str(write())]) == 1
    assert f"error: step convert (1 of 2) {words}; run again to go on there" in capsys.readouterr().err
    state = json.loads((tmp_path / "a home" / "run" / RECORD).read_text())
    assert state["done"] == [] and state["begun"] == "convert"


def test_a_changed_step_is_refused_until_it_is_done_anew(write, tmp_path, capsys, steps):
    home, path = tmp_path / "a home", write()
    record(home, load(path).steps)
    assert main(["run", str(path)]) == 0
    (home / "run" / "distil").mkdir()
    (home / "run" / "distil" / "old").touch()
    steps[1]["overrides"]["max_steps"] = 81
    assert main(["run", str(write())]) == 1
    assert "step distil is done and its definition has changed" in capsys.readouterr().err
    steps[1]["overrides"]["max_steps"] = 80
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.read_text().replace("num_warmup_steps: 3", "num_warmup_steps: 4"))
    steps[1]["config"] = str(config)
    path = write()
    assert main(["run", str(path)]) == 1  # the file's content is part of it
    assert "--from distil" in capsys.readouterr().err
    assert main(["run", str(path), "--from", "distil", "--dry-run"]) == 0
    assert (home / "run" / "distil" / "old").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mamba_hybrid.pipeline.Signals.run", lambda self, words, lock: 0)
        assert main(["run", str(path), "--from", "distil"]) == 0
    assert (home / "run" / "distil.1" / "old").exists() and not (home / "run" / "distil").exists()
    assert Record.read(home / "run").done[1]["digest"] == load(path).steps[1].digest


@pytest.mark.parametrize(
    ("done", "begun", "flags", "words"),
    [
        (1, None, [], "output_dir {home}/run/distil exists and is not of this pipeline"),
        (0, None, ["--from", "distil"], "--from distil: step convert before it is not done"),
        (0, None, ["--from", "align"], "--from align: tiny has the steps convert, distil"),
        (2, None, [], "has step distil done where tiny has other"),
        (3, None, [], "has 3 steps done, tiny has 2"),
    ],
)
def test_a_record_that_does_not_fit(done, begun, flags, words, write, tmp_path, capsys, steps):
    home = tmp_path / "a home"
    was = load(write()).steps
    record(home, [*was, was[0]][:done], begun)
    (home / "run" / "distil").mkdir()
    if done == 2:
        steps[1]["name"] = "other"
    assert main(["run", *flags, str(write())]) == 1
    err = capsys.readouterr().err
    assert words.format(home=home) in err and err.count("\n") == 1
    assert [p.name for p in (home / "run").iterdir() if p.name.startswith("distil")] == ["distil"]


def test_a_damaged_record(write, tmp_path, capsys):
    (tmp_path / "a home" / "run").mkdir()
    (tmp_path / "a home" / "run" / RECORD).write_text('{"done": [')
    assert main(["run", str(write())]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_a_command_takes_what_the_command_line_takes(write):
    words = ["plan", "x.yaml", "--gpus", "2", "batch_size=2"]
    (step,) = load(write(steps=[{"name": "fits", "command": " ".join(words)}])).steps
    assert step.words == ["mamba-hybrid", *words]


DISTIL = {"name": "distil", "recipe": "distill_hybrid", "config": str(CONFIG)}
BAD = {
    "no steps": ({"steps": []}, "lacks steps"),
    "no list": ({"steps": {"a": 1}}, "must be a list of steps"),
    "no name": ({"steps": [{"command": "inspect x"}]}, "step 1 needs a name"),
    "no kind": ({"steps": [{"name": "a"}]}, "step a needs recipe or command"),
    "two kinds": ({"steps": [DISTIL | {"command": "inspect x"}]}, "step distil needs recipe or command"),
    "key": ({"steps": [DISTIL | {"override": {}}]}, "step distil has the key override"),
    "twice": ({"steps": [{"name": "a", "command": "inspect x"}] * 2}, "two steps of the name a"),
    "flag": ({"steps": [{"name": "a", "command": "convert x y --kep 1"}]}, "unrecognized arguments: --kep"),
    "command": ({"steps": [{"name": "a", "command": "convrt x y"}]}, "invalid choice: 'convrt'"),
    "endless": ({"steps": [{"name": "a", "command": "serve x"}]}, "must be one of mamba-hybrid's that end"),
    "quotes": ({"steps": [{"name": "a", "command": "inspect 'x"}]}, "No closing quotation"),
    "variable": ({"steps": [{"name": "a", "command": "inspect ${nothing}"}]}, "'nothing' not found"),
    "recipe": ({"steps": [DISTIL | {"recipe": "distil_hybrid"}]}, "there is no recipe 'distil_hybrid'"),
    "recipe of a package": ({"steps": [DISTIL | {"recipe": "no.such"}]}, "there is no recipe 'no.such'"),
    "config": ({"steps": [DISTIL | {"config": "/nowhere.yaml"}]}, "/nowhere.yaml cannot be read"),
    "processes": ({"steps": [DISTIL | {"processes": 0}]}, "processes 0"),
    "override": ({"steps": [DISTIL | {"overrides": {"loss.kl_wait": 1}}]}, "has no key loss.kl_wait"),
    "list": ({"steps": [DISTIL | {"overrides": ["batch_size=2"]}]}, "must be keys with values"),
    "equals": ({"steps": [DISTIL | {"overrides": {"teacher": "a=b"}}]}, "holds a '='"),
    "one directory": ({"steps": [DISTIL, DISTIL | {"name": "b"}]}, "have one output_dir"),
    "its own directory": ({"output_dir": ".demo/run/x", "steps": [DISTIL]}, "holds that of the pipeline"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_before_anything_runs(case, write, tmp_path, capsys):
    changes, words = BAD[case]
    assert main(["run", str(write(**changes))]) == 1
    err = capsys.readouterr().err
    assert words in err and err.startswith("error: ") and err.count("\n") == 1, err
    assert not (tmp_path / "a home" / "run").exists()


@pytest.mark.parametrize("change", ["nothing=1", "steps=1", "teacher"])
def test_variables_that_there_are_not(change, write, capsys):
    assert main(["run", str(write()), change]) == 1
    assert f"{change}: give key=value" in capsys.readouterr().err


def test_a_variable_that_is_no_yaml(write, capsys):
    assert main(["run", str(write()), "teacher=["]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: teacher=[: the value is no YAML") and err.count("\n") == 1


def test_values_arrive_as_they_are(write, steps, tmp_path):
    values = {"max_steps": None, "compile": True, "student": "null", "teacher": "12", "mixer_lr": 2, "seed": 7}
    steps[1]["overrides"] = values
    words = load(write()).steps[1].words
    given = {}
    for word in words[words.index("--config") + 2 :]:
        key, text = word.split("=")
        given[key] = yaml.safe_load(text)
    assert given == values
