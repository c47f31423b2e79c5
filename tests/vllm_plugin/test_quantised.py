"""Quantised hybrids: what is quantised and what is not, and that the engine computes with what it holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mamba_hybrid import HybridMambaForCausalLM
from mamba_hybrid.checkpoint import load_model

from .conftest import HERE, IN_PROCESS
from .tiny_hybrid import prompts, write_hybrid

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
torchao = pytest.importorskip("torchao.quantization")

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
INT8_STEP, FP8_STEP = 1 / 254, 1 / 16  # largest error of a weight: of its row's largest, of itself


def online(config) -> dict:
    """Arguments of vLLM that quantise while it loads, by a configuration of torchao's."""
    from torchao.core.config import config_to_dict

    json_text = json.dumps(config_to_dict(config))
    return {"quantization": "torchao", "hf_overrides": {"quantization_config_dict_json": json_text}}


@pytest.fixture
def serve(environment, tmp_path):
    """What an engine holds of a checkpoint and makes of prompts; see weights_run.py."""

    def run(model: Path, asked: list[list[int]], **llm) -> dict:
        base = {
            "model": str(model), "dtype": "float32", "max_model_len": 200, "max_num_seqs": 4, "enforce_eager": True,
            "enable_prefix_caching": False,
        }  # fmt: skip
        (tmp_path / "job.json").write_text(json.dumps({"llm": base | llm, "prompts": asked}))
        done = subprocess.run(
            [sys.executable, str(HERE / "weights_run.py"), str(tmp_path / "job.json"), str(tmp_path / "result.pt")],
            env=environment | IN_PROCESS, capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        assert "Attempted to load weight" not in done.stdout + done.stderr  # vLLM's warning, for each tensor
        return torch.load(tmp_path / "result.pt")

    return run


def dequantised(hybrid: Path, result: dict, stored: torch.dtype, dtype=torch.float32) -> HybridMambaForCausalLM:
    """The hybrid with the engine's matrices in place of its own, after a look at each: the big projections are
    quantised and near the checkpoint's, all the rest is the checkpoint's bit for bit, the mixers' cores in fp32."""
    model = load_model(hybrid)
    own, held, seen = dict(model.named_parameters()), result["parameters"], set()
    for layer, matrix in result["matrices"].items():
        if layer == "lm_head":
            continue
        parent, last = layer.rsplit(".", 1)
        names = [f"{parent}.{part}.weight" for part in FUSED.get(last, (last,))]
        seen |= set(names)
        for name, part in zip(names, matrix.float().split([len(own[n]) for n in names]), strict=True):
            if last == "dt_proj":
                assert held[f"{layer}.weight"].dtype == dtype
                assert torch.equal(part, own[name].to(dtype).float())
                continue
            assert held[f"{layer}.weight"].dtype == stored
            assert not torch.equal(part, own[name])
            row = own[name].abs().amax(1, keepdim=True)
            step = row * INT8_STEP if stored == torch.int8 else own[name].abs() * FP8_STEP + row / 448
            rounding = torch.finfo(dtype).eps * row
            assert ((part - own[name]).abs() <= step * 1.01 + 2 * rounding).all(), name
            own[name].data.copy_(part)
    assert {n for n, p in own.items() if p.dim() == 2 and n.endswith("_proj.weight")} == seen
    for name, p in own.items():
        if name not in seen and not name.endswith("_proj.bias"):
            expected = p if ".core." in name else p.to(dtype)
            assert held[name].dtype == expected.dtype and torch.equal(held[name], expected), name
    return model


def difference(model: HybridMambaForCausalLM, asked: list[list[int]], result: dict) -> torch.Tensor:
    """Of the log-probabilities of the prompts' tokens, the model's from the engine's."""
    ours = []
    with torch.no_grad():
        for prompt in asked:
            logprobs = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
            ours.append(logprobs.gather(1, torch.tensor(prompt)[1:, None])[:, 0])
    return (torch.cat(ours) - torch.cat([torch.tensor(row) for row in result["logprobs"]])).abs()


def test_int8_weights(hybrids, serve):
    asked = prompts([17, 64, 130], seed=3)
    result = serve(hybrids["shared"], asked, **online(torchao.Int8WeightOnlyConfig()))
    model = dequantised(hybrids["shared"], result, torch.int8)
    assert difference(model, asked, result).max() < 1e-3
    assert difference(load_model(hybrids["shared"]), asked, result).mean() > 0.05


def test_int8_weights_and_activations(serve, tmp_path):
    """In the layer of our own for keys and values of different widths. Rounded activations flip now and then, and then
    a whole sequence is off by a step, so the prompts are short and the median is looked at."""
    hybrid = write_hybrid(tmp_path / "hybrid", "paper", state_size=16, ssm_rope=False)
    asked = prompts([9] * 16, seed=3)
    result = serve(hybrid, asked, **online(torchao.Int8DynamicActivationInt8WeightConfig()))
    model = dequantised(hybrid, result, torch.int8)
    without = difference(model, asked, result).median()

    def rounded(module: nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
        step = args[0].abs().amax(-1, keepdim=True) / 127
        return (args[0] / step).round() * step

    for name, module in model.named_modules():
        if name.endswith("_proj") and not name.endswith("dt_proj"):
            module.register_forward_pre_hook(rounded)
    assert difference(model, asked, result).median() < 1e-3 < without


def test_fp8_per_channel(hybrids, serve):
    """vLLM's own, activations in fp8 too. Three bits of an activation make a tiny random model differ by half a nat, a
    fifteenth of what another model differs by."""
    asked = prompts([9] * 16, seed=3)
    result = serve(hybrids["shared"], asked, quantization="fp8_per_channel", dtype="float16")
    model = dequantised(hybrids["shared"], result, torch.float8_e4m3fn, torch.float16)
    another = difference(load_model(hybrids["heads"]), asked, result).median()
    assert difference(model, asked, result).median() < another / 5


def test_checkpoint_quantised_by_transformers(hybrids, serve, tmp_path):
    """transformers leaves the step sizes' projection alone without being told, and vLLM loads what it has written."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

    config = TorchAoConfig(torchao.Float8WeightOnlyConfig())
    quantised = AutoModelForCausalLM.from_pretrained(hybrids["shared"], quantization_config=config)
    quantised.save_pretrained(tmp_path / "quantised")
    AutoTokenizer.from_pretrained(hybrids["shared"]).save_pretrained(tmp_path / "quantised")
    asked = prompts([17, 64, 130], seed=3)
    # compiled: torchao 0.15 cannot transpose such a tensor in eager inference mode under torch 2.13
    result = serve(tmp_path / "quantised", asked, enforce_eager=False)
    model = dequantised(hybrids["shared"], result, torch.float8_e4m3fn)
    assert difference(model, asked, result).max() < 1e-3
