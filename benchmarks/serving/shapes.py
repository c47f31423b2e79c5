"""Checkpoints of the shapes of an 8B without weights: a configuration that vLLM fills with dummy ones."""

from __future__ import annotations

import json
from pathlib import Path

LLAMA = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
TINY = LLAMA | {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096, "torch_dtype": "float32",
}  # fmt: skip
LAYERS = {"target": 32, "draft": 2}


def write(folder: Path, kind: str, role: str, tiny: bool) -> Path:
    """A checkpoint's directory.

    Args:
        folder: where to make it.
        kind: "llama"; "heads" or "groups", a hybrid with every other layer a mixer and a state per query head or per KV
            head; "stock", the same with vLLM's Mamba-2 mixer in its place, which cannot draft: its "draft" is a Llama.
        role: "target" or "draft", which has two layers.
        tiny: shapes for a trial on a CPU.
    """
    config = dict(TINY if tiny else LLAMA)
    layers = 4 if tiny and role == "target" else LAYERS[role]
    config["num_hidden_layers"] = layers
    if kind == "llama":
        config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    elif kind == "stock" and role == "draft":
        config |= {"model_type": "llama", "architectures": ["StockDraft"]}
    else:
        config |= {
            "model_type": "mamba_hybrid",
            "architectures": ["StockHybrid" if kind == "stock" else "HybridMambaForCausalLM"],
            "layer_types": ["linear_attention", "full_attention"] * (layers // 2),
            "state_heads": config["num_key_value_heads"] if kind == "groups" else config["num_attention_heads"],
            "mamba_chunk_size": 256,  # of vLLM's mixer
        }
    out = folder / f"{kind}-{role}"
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config))
    return out
