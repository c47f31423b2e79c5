"""LoRA adapters with random weights for tiny hybrids, in the files that PEFT writes, and the same merged."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mamba_hybrid import HybridMambaForCausalLM
from mamba_hybrid.checkpoint import load_model

RANK, ALPHA = 4, 8
ATTENTION, MLP, STEERING = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("gate_proj", "up_proj", "down_proj"),
    ("z_proj", "dt_proj"),
)
PROJECTIONS = (*ATTENTION, *MLP, *STEERING)


def write_adapter(
    out: Path, hybrid: Path, targets: tuple[str, ...], seed: int, strength: float = 0.3, layers: str = ""
) -> Path:
    """An adapter's directory.

    Args:
        out: the directory.
        hybrid: what it is for.
        targets: last parts of the modules' names, PEFT's target_modules.
        seed: of its weights.
        strength: share of a projection's outputs that it adds.
        layers: only modules with this in their names.
    """
    out.mkdir()
    torch.manual_seed(seed)
    tensors = {}
    for name, module in load_model(hybrid).named_modules():
        if not isinstance(module, torch.nn.Linear) or name.rsplit(".", 1)[-1] not in targets or layers not in name:
            continue
        rows, columns = module.weight.shape
        size = strength * RANK / ALPHA * module.weight.std() * columns**0.5
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, columns) / columns**0.5
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, RANK) * size / RANK**0.5
    save_file(tensors, out / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(hybrid), "bias": "none",
        "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": list(targets), "inference_mode": True,
    }  # fmt: skip
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def merged(hybrid: Path, adapter: Path) -> HybridMambaForCausalLM:
    """The hybrid with the adapter added to its weights."""
    model, tensors = load_model(hybrid), load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for name in tensors:
            if ".lora_A." in name:
                b = tensors[name.replace(".lora_A.", ".lora_B.")]
                target = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
                model.get_parameter(target).add_(b @ tensors[name] * ALPHA / RANK)
    return model
