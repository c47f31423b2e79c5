"""Drafters cut from a model."""

from __future__ import annotations

import pytest
import torch

from mamba_hybrid.checkpoint import load_model, save_model
from mamba_hybrid.cli import main
from mamba_hybrid.draft import evenly

from ..tiny import save_transformer


def test_evenly():
    assert evenly(1, 4) == [0] and evenly(2, 30) == [0, 29] and evenly(4, 32) == [0, 10, 21, 31]


@pytest.mark.parametrize("flags,kept", [([], [0, 3]), (["--layers", "3"], [0, 2, 3]), (["--keep-layers", "1"], [1])])
def test_layers_are_those_of_the_model(tmp_path, flags, kept, capsys):
    source = save_transformer(tmp_path / "source", num_hidden_layers=4)
    assert main(["draft", str(source), str(tmp_path / "draft"), *flags]) == 0
    assert f"layers {', '.join(map(str, kept))} of" in capsys.readouterr().out
    whole, part = load_model(source), load_model(tmp_path / "draft")
    assert part.config.num_hidden_layers == len(kept) == len(part.config.layer_types)
    state, want = part.state_dict(), whole.state_dict()
    for name, tensor in state.items():
        parts = name.split(".")
        if name.startswith("model.layers."):
            parts[2] = str(kept[int(parts[2])])
        torch.testing.assert_close(tensor, want[".".join(parts)], rtol=0, atol=0)


def test_mixers_stay_mixers(tmp_path):
    from mamba_hybrid import HybridMambaConfig, HybridMambaForCausalLM

    source = save_transformer(tmp_path / "source", num_hidden_layers=4)
    plain = load_model(source).config
    kinds = ["full_attention", "linear_attention"] * 2
    config = HybridMambaConfig(**{**plain.to_dict(), "layer_types": kinds, "window": 8})
    save_model(tmp_path / "hybrid", config, HybridMambaForCausalLM(config).state_dict().items(), source)
    assert main(["draft", str(tmp_path / "hybrid"), str(tmp_path / "draft"), "--keep-layers", "1,2"]) == 0
    assert load_model(tmp_path / "draft").config.layer_types == ["linear_attention", "full_attention"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--layers", "4"], ["--layers 4", "fewer than the 4"]),
        (["--layers", "0"], ["--layers 0"]),
        (["--keep-layers", "1,9"], ["[1, 9]", "0 to 3"]),
        (["--keep-layers", "2,1"], ["[2, 1]", "in order"]),
    ],
)
def test_refuses(tmp_path, capsys, flags, words):
    source = save_transformer(tmp_path / "source", num_hidden_layers=4)
    capsys.readouterr()
    assert main(["draft", str(source), str(tmp_path / "draft"), *flags]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and all(word in errors[0] for word in words), errors
    assert not (tmp_path / "draft").exists()
