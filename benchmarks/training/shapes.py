"""A teacher and a hybrid of it with random weights on disk, and rows of random tokens: what a speed needs."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers import models as token_models
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from mamba_hybrid import HybridMambaForCausalLM
from mamba_hybrid.config import ATTENTION, MIXER
from mamba_hybrid.mixer import MixerCore
from mamba_hybrid.source import hybrid_config
from torchtune_recipes.packing import PackedRows

# the configurations of Llama-3.2-1B and Llama-3.1-8B
LLAMA_3 = {
    "vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
SHAPES = {
    "1b": LLAMA_3 | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
        "tie_word_embeddings": True, "rope_parameters": ROPE | {"factor": 32.0},
    },
    "8b": LLAMA_3 | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
        "tie_word_embeddings": False, "rope_parameters": ROPE | {"factor": 8.0},
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


def write(folder: Path, shape: str, device: str) -> None:
    """FOLDER/teacher and FOLDER/student, in which every other layer is a mixer, in bf16.

    The student's tensors are what `convert` makes without a text: copies of the teacher's, and neutral cores and gates.
    Copies are hard links to the teacher's files, so that 8B parameters are on the disk once.
    """
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], dtype="bfloat16", architectures=["LlamaForCausalLM"])
    n = config.num_hidden_layers
    hybrid = hybrid_config(config, layer_types=[ATTENTION if i % 2 else MIXER for i in range(n)])
    core = MixerCore(hybrid).float().state_dict()
    with torch.device("meta"):
        shapes = [{name: p.shape for name, p in HybridMambaForCausalLM(c).named_parameters()}
                  for c in (hybrid_config(config), hybrid)]  # fmt: skip
    teacher, student = folder / "teacher", folder / "student"
    index: dict[Path, dict[str, str]] = {teacher: {}, student: {}}

    def save(file: str, tensors: dict[str, Tensor], *owners: Path) -> None:
        if tensors:
            save_file(tensors, owners[0] / file, metadata={"format": "pt"})
        for owner in owners:
            if owner != owners[0] and tensors:
                os.link(owners[0] / file, owner / file)
            index[owner] |= dict.fromkeys(tensors, file)

    for out, its in ((teacher, config), (student, hybrid)):
        out.mkdir(parents=True)
        its.save_pretrained(out)
        words = Tokenizer(token_models.WordLevel({f"w{i}": i for i in range(512)}, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(out)
    for part in ("model.embed_tokens.", "model.norm.", "lm_head.", *(f"model.layers.{i}." for i in range(n))):
        theirs = {name: random_tensor(name, size, device) for name, size in shapes[0].items() if name.startswith(part)}
        mine = {}
        for name, size in shapes[1].items():
            if name.startswith(part) and ".mixer." in name:
                copied = theirs.get(name.replace(".mixer.", ".self_attn."))
                empty = torch.zeros(size, dtype=torch.bfloat16)
                mine[name] = (
                    core[name.partition(".core.")[2]] if ".core." in name else empty if copied is None else copied
                )
        both = {name: theirs.pop(name) for name in list(theirs) if name in shapes[1]}
        save(f"{part}both.safetensors", both, teacher, student)
        save(f"{part}attention.safetensors", theirs, teacher)
        save(f"{part}mixer.safetensors", mine, student)
    for out, where in index.items():
        (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def random_tensor(name: str, size: torch.Size, device: str) -> Tensor:
    """As Llama starts, in bf16, made on the device."""
    if name.endswith("norm.weight"):
        return torch.ones(size, dtype=torch.bfloat16)
    return torch.randn(size, dtype=torch.bfloat16, device=device).mul_(0.02).cpu()


def random_rows(_: PreTrainedTokenizerFast, max_seq_len: int, vocabulary: int, rows: int) -> PackedRows:
    """Documents of 100 to 1,500 random tokens, packed: a data set of the recipes."""
    rng, documents, left = random.Random(0), [], rows * max_seq_len
    while left > 0:
        n = min(rng.randrange(100, 1500), left)
        documents.append(([rng.randrange(vocabulary) for _ in range(n)], None))
        left -= n
    return PackedRows(documents, max_seq_len)
