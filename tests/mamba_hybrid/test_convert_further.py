"""Hybrids as sources: more of their attention becomes mixers; and mixers that come from another hybrid."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from mamba_hybrid.checkpoint import load_config, load_model
from mamba_hybrid.cli import main
from mamba_hybrid.compare import compare
from mamba_hybrid.text import read_texts, token_stream
from tests.tiny import save_text, save_transformer

CALIBRATED = ("--calibrate-tokens", "1024", "--calibrate-length", "128")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A `teacher` in bf16, a `half` of it with a window of 8, as if it had been trained since, and `text.jsonl`."""
    home = tmp_path_factory.mktemp("further")
    save_transformer(home / "teacher")
    save_text(home / "text.jsonl")
    made = ["convert", str(home / "teacher"), str(home / "half"), "--window", "8", "--dtype", "bfloat16"]
    assert main([*made, "--calibrate", str(home / "text.jsonl"), *CALIBRATED]) == 0
    weights = load_file(home / "half" / "model.safetensors")
    rng = torch.Generator().manual_seed(0)
    for w in weights.values():
        w += (0.01 * w.float().std().nan_to_num() * torch.randn(w.shape, generator=rng)).to(w.dtype)
    save_file(weights, home / "half" / "model.safetensors", metadata={"format": "pt"})
    return home


def weights(path):
    return load_file(path / "model.safetensors")


def test_the_chain_keeps_everything_but_the_attention_that_it_converts(home, tmp_path):
    text, before = home / "text.jsonl", home / "half"
    for keep, mixers, new in ((0.25, [0, 1, 2], 1), (0.0, [0, 1, 2, 3], 3)):
        out, raw = tmp_path / f"calibrated-{keep}", tmp_path / f"copied-{keep}"
        words = ["convert", str(before), "OUT", "--keep", str(keep)]
        assert main([*words[:2], str(raw), *words[3:]]) == 0
        assert main([*words[:2], str(out), *words[3:], "--calibrate", str(text), *CALIBRATED]) == 0
        assert load_config(out).mixer_layers == mixers and load_config(out).window == 8
        old, now = weights(before), weights(out)
        kept = {name for name in old if f".{new}.self_attn." not in name}
        assert {name for name in now if name not in kept} == {
            name for name in now if f".{new}.mixer." in name
        } and kept <= now.keys()
        for name in kept:
            assert now[name].dtype == old[name].dtype and torch.equal(now[name], old[name]), name
        for part in ("q", "k", "v"):
            w = f"{part}_proj.weight"
            assert torch.equal(now[f"model.layers.{new}.mixer.{w}"], old[f"model.layers.{new}.self_attn.{w}"])
        copied, fitted = compare(before, [str(raw), str(out)], text, tokens=512, length=128).values()
        assert 0 < fitted.kl < copied.kl / 2
        before = out


def test_the_new_layer_is_fitted_to_the_hybrid_as_it_is(home, tmp_path, capsys):
    """The KL that is reported is the distance from the hybrid, which is another model than the Transformer."""
    words = ["convert", str(home / "half"), str(tmp_path / "out"), "--keep", "0.25", "--calibrate"]
    assert main([*words, str(home / "text.jsonl"), *CALIBRATED, "--calibrate-on", "student"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if "  " in line][1:] == ["1"]  # one row in the table
    reported = float(out.split("step-0 KL ")[1].split()[0])
    # held out of the fit is the last of the eight sequences
    tokens, _ = token_stream(read_texts(home / "text.jsonl"), AutoTokenizer.from_pretrained(home / "half"), 1024)
    q, near, far = (
        load_model(path)(tokens[None, -128:]).logits.log_softmax(-1).detach()
        for path in (tmp_path / "out", home / "half", home / "teacher")
    )
    kl_near, kl_far = (float((p.exp() * (p - q)).sum(-1).mean()) for p in (near, far))
    assert reported == pytest.approx(kl_near, rel=0.05) and kl_far > 1.2 * reported  # it is stored in bf16
    card = (tmp_path / "out" / "README.md").read_text()
    assert "3 of 4 attention layers" in card and "Layers 1 were converted last" in card and str(tmp_path) not in card


def test_chosen_layers_and_the_mixers_of_another_hybrid(home, tmp_path, capsys):
    mixers, out = tmp_path / "mixers", tmp_path / "out"
    assert main(["convert", str(home / "half"), str(mixers), "--keep", "0"]) == 0
    (tmp_path / "layers.json").write_text(json.dumps({"layers": 4, "attention_layers": [0, 3]}))
    words = ["convert", str(home / "teacher"), str(out), "--layers-from", str(tmp_path / "layers.json")]
    words += ["--mixers-from", str(mixers), "--dtype", "bfloat16"]
    assert main(words) == 0
    assert f"layers 1, 2: the mixers of {mixers}\nKL not measured" in capsys.readouterr().out
    assert load_config(out).mixer_layers == [1, 2] and load_config(out).window == 8
    now, given, teacher = weights(out), weights(mixers), weights(home / "teacher")
    for name, w in now.items():
        expected = given[name] if ".mixer." in name else teacher[name].bfloat16()
        assert torch.equal(w, expected), name
    assert main([*words, "--overwrite", "--calibrate", str(home / "text.jsonl"), *CALIBRATED]) == 0
    assert "step-0 KL" in capsys.readouterr().out
    assert all(torch.equal(w, now[name]) for name, w in weights(out).items())  # measured, not fitted


REFUSED = {
    "nothing left": (["{half}", "{out}"], "--keep 0.5 leaves nothing to convert"),
    "all named": (["{half}", "{out}", "--attention-layers", "1,3"], "leave nothing to convert"),
    "a mixer as attention": (["{half}", "{out}", "--attention-layers", "0,1"], "[0] are mixers in"),
    "another window": (["{half}", "{out}", "--keep", "0", "--window", "16"], "is 8, not 16"),
    "the paper's start": (["{half}", "{out}", "--keep", "0", "--init", "original"], "leave out --init original"),
    "no such mixers": (
        ["{teacher}", "{out}", "--keep", "0", "--mixers-from", "{half}"],
        "has no mixer in layers [1, 3]",
    ),
    "mixers of another window": (
        ["{teacher}", "{out}", "--attention-layers", "1,3", "--mixers-from", "{half}", "--window", "64"],
        "leave out --window",
    ),
    "mixers of two kinds": (["{half}", "{out}", "--keep", "0", "--mixers-from", "{wide}"], "leave out --mixers-from"),
    "mixers of a Transformer": (
        ["{teacher}", "{out}", "--mixers-from", "{teacher}"],
        "has no mixer in layers [0, 2]",
    ),
    "mixers of another shape": (["{other}", "{out}", "--mixers-from", "{half}"], "has hidden_size 48"),
    "no choice": (["{teacher}", "{out}", "--layers-from", "{teacher}/config.json"], "is no layers.json"),
    "no file": (["{teacher}", "{out}", "--layers-from", "{out}.json"], "is no layers.json"),
    "a choice for another depth": (["{teacher}", "{out}", "--layers-from", "{layers}"], "is of a model of 9 layers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, home, tmp_path, capsys):
    args, message = REFUSED[case]
    (tmp_path / "layers.json").write_text('{"layers": 9, "attention_layers": [8]}')
    if "{other}" in args:
        save_transformer(tmp_path / "other", hidden_size=96)
        capsys.readouterr()
    if "{wide}" in args:
        assert main(["convert", str(home / "teacher"), str(tmp_path / "wide"), "--keep", "0"]) == 0
        capsys.readouterr()
    before = sorted(tmp_path.iterdir())
    places = {"half": home / "half", "teacher": home / "teacher", "out": tmp_path / "out"}
    places |= {"other": tmp_path / "other", "layers": tmp_path / "layers.json", "wide": tmp_path / "wide"}
    assert main(["convert", *(a.format(**places) for a in args)]) == 1
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1, err
    assert sorted(tmp_path.iterdir()) == before
