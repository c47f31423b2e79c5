import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mamba_hybrid.checkpoint import load_model
from mamba_hybrid.cli import main
from mamba_hybrid.compare import compare, paired_p
from mamba_hybrid.convert import Conversion, attention_layers, convert
from tests.tiny import FAMILIES, save_text, save_transformer


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_transformer(tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return save_text(tmp_path_factory.mktemp("text") / "text.jsonl")


def job(source, out, text=None, **more) -> Conversion:
    return Conversion(str(source), str(out), calibrate=text and str(text), tokens=2048, length=256, **more)


def test_evenly_spread_layers():
    assert attention_layers(8, 0.5) == [1, 3, 5, 7]
    assert attention_layers(32, 0.25) == [3, 7, 11, 15, 19, 23, 27, 31]  # the paper's
    assert attention_layers(4, 0) == [] and attention_layers(4, 1) == [0, 1, 2, 3]
    assert len(attention_layers(30, 22 / 30)) == 22


@pytest.mark.parametrize("family", FAMILIES)
def test_converted_families_load_and_calibration_brings_them_nearer(family, tmp_path, text):
    src = save_transformer(tmp_path / "src", family)
    convert(job(src, tmp_path / "copied"))
    report = convert(job(src, tmp_path / "fitted", text))
    assert report.config.mixer_layers == [0, 2]
    for fit in report.fits.values():
        assert fit.after < fit.before and fit.after < 1
    distances = compare(src, [str(tmp_path / "copied"), str(tmp_path / "fitted")], text, tokens=1024, length=256)
    copied, fitted = distances.values()
    assert fitted.kl < copied.kl / 2
    assert paired_p(copied, fitted) < 0.01
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fitted", dtype=torch.float32)
    assert model.config.window == 64 and model.generation_config.eos_token_id == 256
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "fitted")
    assert "<|user|>hello" in tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)


def test_kept_layers_are_untouched(source, tmp_path, text):
    convert(job(source, tmp_path / "out", text, attention_layers=[0, 1, 3]))
    old, new = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in old.items():
        if ".2.self_attn." not in name:
            assert torch.equal(tensor, new[name]), name
    for part in ("q", "k", "v"):
        assert torch.equal(
            old[f"model.layers.2.self_attn.{part}_proj.weight"], new[f"model.layers.2.mixer.{part}_proj.weight"]
        )


def test_everything_kept_is_the_teacher(source, tmp_path, text):
    convert(job(source, tmp_path / "same", keep=1.0))
    d = compare(source, [str(tmp_path / "same")], text, tokens=512, length=256)[str(tmp_path / "same")]
    assert d.kl < 1e-9 and d.agreement == 1 and abs(d.perplexity_ratio - 1) < 1e-6


def test_step0_kl_is_what_compare_measures(source, tmp_path, text):
    """The walk's own KL, layer by layer, against the written checkpoint's on the same held-out tokens."""
    report = convert(job(source, tmp_path / "out", text))
    held = report.kl_tokens
    teacher, student = load_model(source), load_model(tmp_path / "out")
    from mamba_hybrid.text import read_texts, token_stream

    stream, _ = token_stream(read_texts(text), AutoTokenizer.from_pretrained(source), 2048)
    ids = stream.view(-1, 256)[-held // 256 :]
    with torch.no_grad():
        p, q = (m(ids).logits.log_softmax(-1) for m in (teacher, student))
    assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(report.kl, rel=1e-3)


@pytest.mark.parametrize("inputs", ["student", "teacher"])
@pytest.mark.parametrize("mixer", [dict(window=0), dict(state_heads=2), dict(short_conv=4), dict(gate="none")])
def test_variants(inputs, mixer, source, tmp_path, text):
    report = convert(job(source, tmp_path / "out", text, inputs=inputs, mixer=mixer))
    for key, value in mixer.items():
        assert getattr(report.config, key) == value
    assert load_model(tmp_path / "out").config.to_dict() == report.config.to_dict() | {
        "dtype": load_model(tmp_path / "out").config.to_dict()["dtype"]
    }


def test_original_start_is_far_off(source, tmp_path, text):
    convert(job(source, tmp_path / "ours", text))
    report = convert(job(source, tmp_path / "original", init="original"))
    assert (report.config.gate, report.config.norm, report.config.window) == ("silu", "after_gate", 0)
    ours, original = compare(
        source, [str(tmp_path / "ours"), str(tmp_path / "original")], text, tokens=512, length=256
    ).values()
    assert original.kl > 3 * ours.kl


def test_card_holds_the_recipe(source, tmp_path, text):
    convert(job(source, tmp_path / "out", text))
    card = (tmp_path / "out" / "README.md").read_text()
    recipe = json.loads(card.split("```json")[1].split("```")[0])
    assert recipe["source"] == "llama" and recipe["calibrate"] == "text.jsonl" and recipe["tokens"] == 2048
    assert str(tmp_path) not in card


def test_dtype(source, tmp_path):
    convert(job(source, tmp_path / "out", dtype="bfloat16"))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.norm.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.0.mixer.core.A_log"].dtype == torch.float32


def test_a_killed_conversion_leaves_nothing(source, tmp_path, text):
    out = tmp_path / "out"
    p = subprocess.Popen(
        [sys.executable, "-m", "mamba_hybrid.cli", "convert", str(source), str(out), "--calibrate", str(text),
         "--calibrate-tokens", "40000", "--calibrate-length", "256"],
    )  # fmt: skip
    deadline = time.time() + 60
    while not list(tmp_path.glob(".out.*")) and time.time() < deadline:
        time.sleep(0.05)
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    assert not out.exists()
    assert main(["convert", str(source), str(out)]) == 0


def test_a_conversion_that_is_told_to_end_leaves_nothing(source, tmp_path, monkeypatch):
    def told(*_) -> None:
        assert list(tmp_path.glob(".out.*"))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("mamba_hybrid.checkpoint.ShardWriter.close", told)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(source), str(tmp_path / "out")])
    assert ended.value.code == 143 and list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_full_disk_is_one_line_and_leaves_nothing(source, tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        code = main(["convert", str(source), str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    err = capsys.readouterr().err
    assert code == 1 and f"{tmp_path}/out cannot be written" in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_overwrite(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    assert main(["convert", str(source), str(out), "--overwrite"]) == 0  # an empty directory
    assert {oct(path.stat().st_mode & 0o777) for path in out.iterdir()} == {"0o644"}
    monkeypatch.chdir(out)
    assert main(["convert", str(source), ".", "--keep", "0.25", "--overwrite"]) == 0
    assert load_model(out).config.mixer_layers == [0, 1, 2]
    # the source itself, which is read until the new one is whole
    assert main(["convert", str(out), str(out), "--keep", "0", "--overwrite"]) == 0
    assert load_model(out).config.mixer_layers == [0, 1, 2, 3]
    # where the new one cannot take its place, the old one is put back
    monkeypatch.setattr("mamba_hybrid.checkpoint.to_disk", lambda path: path.parent == tmp_path and shutil.rmtree(path))
    assert main(["convert", str(source), str(out), "--overwrite"]) == 1
    assert load_model(out).config.mixer_layers == [0, 1, 2, 3] and list(tmp_path.iterdir()) == [out]


ERRORS = {
    "no such source": (["convert", "{tmp}/nothing", "{tmp}/o"], "nothing does not exist"),
    "layers out of range": (
        ["convert", "{src}", "{tmp}/o", "--attention-layers", "1,9"],
        "[9] are not among the model's layers 0..3",
    ),
    "share out of range": (["convert", "{src}", "{tmp}/o", "--keep", "1.5"], "--keep 1.5"),
    "state heads": (["convert", "{src}", "{tmp}/o", "--state-heads", "5"], "state_heads 5 must be a multiple"),
    "no calibration text": (
        ["convert", "{src}", "{tmp}/o", "--calibrate", "{tmp}/none.txt"],
        "none.txt cannot be read",
    ),
    "short calibration text": (
        ["convert", "{src}", "{tmp}/o", "--calibrate", "{tmp}/short.txt"],
        "--calibrate-length 1024",
    ),
    "long sequences": (
        ["convert", "{src}", "{tmp}/o", "--calibrate", "{text}", "--calibrate-length", "4096"],
        "context 512",
    ),
    "column": (
        ["convert", "{src}", "{tmp}/o", "--calibrate", "{text}", "--column", "body"],
        "'body' (there is ['text'])",
    ),
    "no such device": (
        ["convert", "{src}", "{tmp}/o", "--calibrate", "{text}", "--device", "nonsense"],
        "--device nonsense is not on this machine",
    ),
    "no length": (
        ["convert", "{src}", "{tmp}/o", "--calibrate", "{text}", "--calibrate-length", "0"],
        "--calibrate-length 0",
    ),
    "too few tokens": (
        [
            "convert",
            "{src}",
            "{tmp}/o",
            "--calibrate",
            "{text}",
            "--calibrate-tokens",
            "99",
            "--calibrate-length",
            "50",
        ],
        "--calibrate-tokens 99",
    ),
    "half of a character": (
        ["convert", "{src}", "{tmp}/o", "--calibrate", "{tmp}/half.jsonl", "--calibrate-length", "64"],
        "half.jsonl, line 2 holds '\\ud83d'",
    ),
    "ridge": (["convert", "{src}", "{tmp}/o", "--ridge", "nan"], "--ridge nan"),
    "no context": (["convert", "{src}", "{tmp}/o", "--max-positions", "0"], "--max-positions 0"),
    "the paper's start of another kind": (
        ["convert", "{src}", "{tmp}/o", "--init", "original", "--window", "8", "--gate", "none"],
        "leave out --window, --gate",
    ),
    "compare no tokens": (["compare", "{src}", "{src}", "--text", "{text}", "--tokens", "1"], "--tokens 1"),
    "compare on one token": (["compare", "{src}", "{src}", "--text", "{tmp}/one.txt"], "one.txt has 1 tokens"),
    "compare without tokenizer": (
        ["compare", "{src}", "{tmp}/bare", "--text", "{text}", "--tokens", "8"],
        "bare has no tokenizer",
    ),
    "compare into no directory": (
        ["compare", "{src}", "{src}", "--text", "{text}", "--json", "{tmp}/none/x.json"],
        "--json {tmp}/none/x.json: there is no directory",
    ),
    "compare into a directory": (
        ["compare", "{src}", "{src}", "--text", "{text}", "--json", "{tmp}"],
        "--json {tmp} is a directory",
    ),
    "compare on no device": (
        ["compare", "{src}", "{src}", "--text", "{text}", "--device", "nonsense"],
        "--device nonsense",
    ),
    "existing out": (["convert", "{src}", "{tmp}"], "--overwrite"),
    "compare without student": (["compare", "{src}", "{tmp}/none", "--text", "{text}"], "none does not exist"),
    "overwrite what is no checkpoint": (["convert", "{src}", "{tmp}", "--overwrite"], "{tmp} is no checkpoint"),
    "overwrite a file": (["convert", "{src}", "{tmp}/one.txt", "--overwrite"], "one.txt is no checkpoint"),
    "inspect no context": (["inspect", "{src}", "--context", "0"], "--context 0"),
    "inspect fewer than no drafts": (["inspect", "{src}", "--drafts", "-1"], "--drafts -1"),
    "inspect a file": (["inspect", "{tmp}/short.txt"], "is no GGUF file"),
    "import a directory": (["import", "{src}", "{tmp}/o"], "is a directory already"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_one_line_and_leaves_nothing(case, source, tmp_path, text, capsys):
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "one.txt").write_text("x")
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n{"text": "cut \\ud83d"}\n')
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, tmp_path / "bare")
    args, message = ERRORS[case]
    message = message.format(tmp=tmp_path)
    before = sorted(tmp_path.iterdir())
    code = main([a.format(tmp=tmp_path, src=source, text=text) for a in args])
    err = capsys.readouterr().err
    assert code == 1
    assert message in err and err.startswith("error: ") and err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_other_vocabulary(source, tmp_path, text, capsys):
    other = save_transformer(tmp_path / "other", vocab_size=300)
    assert main(["compare", str(source), str(other), "--text", str(text)]) == 1
    assert "259 tokens" in capsys.readouterr().err


def test_inspect(source, tmp_path, capsys):
    assert main(["convert", str(source), str(tmp_path / "out"), "--state-heads", "2"]) == 0
    assert main(["inspect", str(tmp_path / "out"), "--context", "512"]) == 0
    out = capsys.readouterr().out
    assert "2 attention [1, 3], 2 mixers [0, 2]" in out and "2 states of 8 x 8" in out
    kv = 2 * 2 * 2 * 8 * 4 * 512 / 2**20  # layers, k and v, KV heads, width, bytes, tokens
    assert f"KV cache   {kv:.2f} MiB" in out
