"""Batch generation: what it refuses before the engine starts, how its output file continues, and a killed run."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from mamba_hybrid.checkpoint import load_model
from mamba_hybrid.cli import main
from mamba_hybrid.errors import UserError
from vllm_plugin.generate import add_arguments, fingerprint, row_seed
from vllm_plugin.results import Results
from vllm_plugin.rows import read_rows
from vllm_plugin.training_set import TrainingSet

from .tiny_hybrid import prompts, reference, text

GOOD = '{"prompt": "w10 w11", "id": "a"}'


@pytest.fixture
def tokenizer(hybrids):
    return AutoTokenizer.from_pretrained(hybrids["shared"])


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_rows(tmp_path, tokenizer):
    chat = '{"messages": [{"role": "user", "content": "w20 w21"}], "note": 1}'
    rows = read_rows(write(tmp_path / "in.jsonl", GOOD, "", chat, '{"prompt": "w9"}'), tokenizer)
    assert [row.id for row in rows] == ["a", 3, 4]
    assert rows[0].tokens == [10, 11]
    assert rows[1].tokens == [3, 5, 20, 21, 2, 4, 5]  # user : w20 w21 </s> assistant :
    assert rows[1].data == json.loads(chat)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2 is no JSON"),
        ("[1]", "line 2 is list"),
        ('{"text": "w9"}', r"one of 'prompt' and 'messages'; it has the keys \['text'\]"),
        ('{"prompt": "w9", "messages": []}', "one of 'prompt' and 'messages'"),
        ('{"prompt": 9}', "'prompt' is int"),
        ('{"prompt": ""}', "line 2: the prompt is empty"),
        ('{"messages": []}', "at least one message"),
        ('{"messages": [{"role": "user"}]}', "a 'role' and a 'content'"),
        ('{"prompt": "w9", "id": "a"}', "id 'a' is that of line 1"),
        ('{"prompt": "w9", "id": 1.5}', "id 1.5 is neither"),
        ('{"prompt": "w9", "id": "\\ud83d"}', r"line 2 holds '\\ud83d'"),
    ],
)
def test_bad_row(tmp_path, tokenizer, line, says):
    with pytest.raises(UserError, match=says):
        read_rows(write(tmp_path / "in.jsonl", GOOD, line), tokenizer)


def test_no_chat_template(tmp_path, tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        read_rows(write(tmp_path / "in.jsonl", '{"messages": [{"role": "user", "content": "w9"}]}'), tokenizer)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-tokens", "1023"], ["in.jsonl, line 1", "2 tokens", "--max-tokens 1023", "1024", "--skip-long"]),
        (["--max-model-len", "10", "--max-tokens", "9"], ["line 1", "context of 10"]),
        (["--max-model-len", "1025"], ["--max-model-len 1025", "1024"]),
        (["--max-model-len", "0"], ["--max-model-len 0"]),
        (["--n", "0"], ["--n 0"]),
        (["--n", "2"], ["--n 2", "--temperature"]),
        (["--temperature", "-1"], ["--temperature -1"]),
        (["--temperature", "nan"], ["--temperature nan"]),
        (["--temperature", "inf"], ["--temperature inf"]),
        (["--skip-long", "--max-tokens", "1023"], ["--skip-long", "--max-tokens 1023", "1024"]),
        (["--overwrite", "--output", "in.jsonl"], ["--output in.jsonl is --input too"]),
        (["--training-set", "in.jsonl", "--overwrite"], ["--training-set in.jsonl is --input too"]),
        (["--training-set", "out"], ["record of --training-set out.json is --output too"]),
        (["--top-p", "0"], ["--top-p 0"]),
        (["--batch", "0"], ["--batch 0"]),
        (["--speculative-config", "{"], ["--speculative-config", "no JSON"]),
        (["--speculative-config", "3"], ["--speculative-config 3"]),
        (["--training-set", "set.jsonl"], ["in.jsonl, line 1 has a 'prompt'", "--training-set"]),
    ],
)
def test_refused_before_the_engine_starts(hybrids, tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    rows, out = write(tmp_path / "in.jsonl", GOOD), tmp_path / "out.json"
    start = time.monotonic()
    code = main(["generate", str(hybrids["shared"]), "--input", str(rows), "--output", str(out), *flags])
    assert code == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ")
    assert all(word in errors[0] for word in words), errors
    assert list(tmp_path.iterdir()) == [rows] and rows.read_text() == f"{GOOD}\n"
    assert time.monotonic() - start < 10


def test_help_imports_no_vllm(tmp_path):
    code = "import sys; from vllm_plugin.generate import add_arguments; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert parser.parse_args(["DIR", "--input", "i", "--output", "o"]).max_tokens == 256


SETTINGS = {"checkpoint": "f00", "n": 1, "temperature": 0.0}
INPUTS = {1: {"prompt": "w9"}, 2: {"prompt": "w10"}}


def answer(id: int) -> dict:
    return {"id": id, "input": INPUTS[id], "outputs": [{"text": "ä\u2028\n"}]}


def test_results_continue(tmp_path):
    path = tmp_path / "out.jsonl"
    with Results(path, SETTINGS, INPUTS) as results:
        assert results.done == set()
        results.append(answer(1))
        assert len(path.read_bytes().splitlines()) == 1  # flushed
        with pytest.raises(UserError, match="another run"):
            Results(path, SETTINGS, INPUTS)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-9])  # killed while it wrote
    with Results(path, SETTINGS, INPUTS) as results:
        assert results.done == {1}
        results.append(answer(2))
    lines = path.read_bytes().decode().split("\n")
    assert [json.loads(line)["id"] for line in lines[:-1]] == [1, 2] and lines[-1] == ""
    assert path.read_bytes().startswith(whole)
    assert json.loads(lines[0])["settings"] == SETTINGS


def test_results_refuse_other_settings_or_prompts(tmp_path):
    path = tmp_path / "out.jsonl"
    with Results(path, SETTINGS, INPUTS) as results:
        results.append(answer(1))
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"temperature 0.0, not 0.5.*--overwrite"):
        Results(path, SETTINGS | {"temperature": 0.5}, INPUTS)
    with pytest.raises(UserError, match="checkpoint 'f00', not 'ba2'"):
        Results(path, SETTINGS | {"checkpoint": "ba2"}, INPUTS)
    with pytest.raises(UserError, match="answers another prompt under id 1"):
        Results(path, SETTINGS, {1: {"prompt": "w77"}})
    path.write_bytes(b"{}\n" + before)
    with pytest.raises(UserError, match="line 1 is no row"):
        Results(path, SETTINGS, INPUTS)
    path.write_bytes(before)
    with Results(path, SETTINGS | {"n": 2}, INPUTS, overwrite=True) as results:
        assert path.read_bytes() == before  # until there is something instead
        results.append(answer(2))
    assert [json.loads(line)["id"] for line in path.read_text().split("\n")[:-1]] == [2]


def test_results_leave_no_empty_file(tmp_path):
    with pytest.raises(RuntimeError), Results(tmp_path / "out.jsonl", SETTINGS, INPUTS):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="cannot be written"):
        Results(tmp_path / "no" / "out.jsonl", SETTINGS, INPUTS)


def test_results_on_a_full_disk(tmp_path):
    path = tmp_path / "out.jsonl"
    with Results(path, SETTINGS, INPUTS) as results:
        results.append(answer(1))
    whole = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with (
            pytest.raises(UserError, match=r"cannot be written.*run again"),
            Results(path, SETTINGS, INPUTS) as results,
        ):
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 9, limits[1]))
            results.append(answer(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(path.read_bytes()) == len(whole) + 9
    with Results(path, SETTINGS, INPUTS) as results:
        assert results.done == {1}
    assert path.read_bytes() == whole


def test_fingerprint_and_seed(hybrids, tmp_path):
    copy = shutil.copytree(hybrids["shared"], tmp_path / "copy")
    assert fingerprint(copy) == fingerprint(hybrids["shared"]) != fingerprint(hybrids["heads"])
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert fingerprint(copy) != fingerprint(hybrids["shared"])
    assert len({row_seed(seed, id) for seed in (0, 1) for id in (1, 2, "1")}) == 6
    assert row_seed(0, "a") == row_seed(0, "a")


ASKED = [{"messages": [{"role": "user", "content": f"w{i}"}], "id": f"q{i}"} for i in range(4)]


def answered(path, asked, *finished):
    """An output file as `generate` writes it, answers in an order of their own."""
    with Results(path, SETTINGS, {row["id"]: row for row in asked}) as results:
        for row in reversed(asked):
            outputs = [{"text": f"to {row['id']}", "finish_reason": reason, "tokens": 2} for reason in finished]
            results.append({"id": row["id"], "input": row, "outputs": outputs})
    return path


def test_training_set(tmp_path, tokenizer):
    from torchtune_recipes.data import chat_dataset

    out = answered(tmp_path / "out.jsonl", ASKED, "stop", "length", "stop")
    made = TrainingSet(tmp_path / "set.jsonl", SETTINGS)
    assert made.write(out, ["q0", "q2", "q1", "q9"]) == (6, 3)
    lines = [json.loads(line) for line in made.path.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["q0", "q0", "q2", "q2", "q1", "q1"]
    assert lines[0]["messages"] == [*ASKED[0]["messages"], {"role": "assistant", "content": "to q0"}]
    record = json.loads((tmp_path / "set.jsonl.json").read_text())
    assert record["settings"] == SETTINGS and record["conversations"] == 6 and record["cut_off"] == 3
    # what it was made for
    labels = chat_dataset(tokenizer, str(made.path), 64).batch(np.array([0])).labels[0]
    assert tokenizer.decode(labels[labels != -100]).startswith("<pad> <pad> </s> <pad> <pad> </s>")  # to q0, to q0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "set.jsonl", "set.jsonl.json"]


def test_training_set_refuses(tmp_path, hybrids, capsys):
    out, path = answered(tmp_path / "out.jsonl", ASKED, "stop"), tmp_path / "set.jsonl"
    TrainingSet(path, SETTINGS).write(out, ["q1"])
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"was made with temperature 0.0, not 0.5; give another --training-set"):
        TrainingSet(path, SETTINGS | {"temperature": 0.5})
    TrainingSet(path, SETTINGS | {"temperature": 0.5}, overwrite=True)
    assert path.read_bytes() == before
    (tmp_path / "set.jsonl.json").unlink()
    with pytest.raises(UserError, match="has no record"):
        TrainingSet(path, SETTINGS)
    with pytest.raises(UserError, match="there is no directory"):
        TrainingSet(tmp_path / "none" / "set.jsonl", SETTINGS)
    cut = answered(tmp_path / "cut.jsonl", ASKED, "length")
    with pytest.raises(UserError, match="all 4 answers were cut off"):
        TrainingSet(tmp_path / "none.jsonl", SETTINGS).write(cut, [row["id"] for row in ASKED])
    assert not list(tmp_path.glob("*none.jsonl*"))
    ended = {"messages": [{"role": "user", "content": "w9"}, {"role": "assistant", "content": "w8"}]}
    rows = write(tmp_path / "in.jsonl", json.dumps(ended))
    flags = ["--output", str(tmp_path / "o.jsonl"), "--training-set", str(tmp_path / "s.jsonl")]
    assert main(["generate", str(hybrids["shared"]), "--input", str(rows), *flags]) == 1
    assert "line 1 ends with a turn of the assistant" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_run_continues(hybrids, tmp_path, environment):
    asked = prompts([5, 40, 90, 3, 150, 17, 64, 8], seed=3)
    # the first as a conversation, whose prompt the template makes
    talk = {"messages": [{"role": "user", "content": text(asked[0])}]}
    rows = [json.dumps(talk), *(json.dumps({"prompt": text(p)}) for p in asked[1:])]
    asked[0] = [3, 5, *asked[0], 2, 4, 5]
    rows += [json.dumps({"prompt": text(prompts([400])[0])})]
    write(tmp_path / "in.jsonl", *rows)
    out = tmp_path / "out.jsonl"
    command = [
        sys.executable, "-m", "mamba_hybrid.cli", "generate", hybrids["shared"], "--input", tmp_path / "in.jsonl",
        "--output", out, "--n", 3, "--temperature", 0.05, "--top-k", 2, "--max-tokens", 48, "--max-model-len", 256,
        "--batch", 3, "--dtype", "float32", "--enforce-eager", "--skip-long",
    ]  # fmt: skip
    command = [str(c) for c in command]
    with (tmp_path / "log").open("w") as log:
        # a session of its own, so that the engine's processes can be killed with it
        first = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + 200
            while not (out.exists() and out.stat().st_size) and first.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            os.killpg(first.pid, signal.SIGKILL)
            first.wait()
    kept = out.read_bytes()
    kept = kept[: kept.rindex(b"\n") + 1]
    done = kept.count(b"\n")
    assert 0 < done < len(asked), (tmp_path / "log").read_text()[-3000:]
    out.write_bytes(kept + b'{"id": 3, "inp')

    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr[-3000:]
    assert f"{len(asked) - done} rows answered, {done} were there, 1 skipped" in second.stderr
    assert "tok/s]" in second.stderr  # the progress bar, in a log too
    assert out.read_bytes().startswith(kept)
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(a["id"] for a in answers) == list(range(1, len(asked) + 1))
    model = load_model(hybrids["shared"])
    greedy = 0
    for a in answers:
        assert a["input"] == json.loads(rows[a["id"] - 1])
        assert a["settings"]["temperature"] == 0.05 and a["model"] == str(hybrids["shared"])
        assert len(a["outputs"]) == 3
        best, _ = reference(model, asked[a["id"] - 1], 4)
        for output in a["outputs"]:
            assert output["finish_reason"] in ("length", "stop")
            assert output["tokens"] == 48 or output["finish_reason"] == "stop"
            greedy += output["text"].split()[:4] == [f"w{t}" for t in best]
    # almost no temperature: nearly all begin as the best tokens do
    assert greedy > 0.8 * 3 * len(asked)

    # the real answers as a training set, as if the model had ended them
    whole = out.read_text().replace('"finish_reason": "length"', '"finish_reason": "stop"')
    made = TrainingSet(tmp_path / "set.jsonl", {})
    assert made.write(write(tmp_path / "whole.jsonl", *whole.splitlines()), [1]) == (3, 0)
    outputs = next(a["outputs"] for a in answers if a["id"] == 1)
    said = [json.loads(line)["messages"] for line in made.path.read_text().splitlines()]
    assert said == [[*talk["messages"], {"role": "assistant", "content": o["text"]}] for o in outputs]

    third = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert third.returncode == 0 and "0 rows answered" in third.stderr
    changed = subprocess.run([*command, "--top-k", "3"], env=environment, capture_output=True, text=True, timeout=60)
    assert changed.returncode == 1 and "top_k 2, not 3" in changed.stderr
