"""A teacher and a hybrid of it with random weights on disk, and rows of random tokens: what a speed needs."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers import models as token_models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mamba_hybrid.convert import Conversion, convert
from torchtune_recipes.packing import PackedRows

# Llama-3.2-1B's configuration
SHAPES = {
    "1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


def write(folder: Path, shape: str, device: str) -> None:
    """FOLDER/teacher and FOLDER/student, in which every other layer is a mixer, in bf16."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], dtype="bfloat16")).bfloat16()
    model.save_pretrained(folder / "teacher")
    words = {f"w{i}": i for i in range(512)}
    tokenizer = Tokenizer(token_models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(folder / "teacher")
    convert(Conversion(str(folder / "teacher"), str(folder / "student")))


def random_rows(_: PreTrainedTokenizerFast, max_seq_len: int, vocabulary: int, rows: int) -> PackedRows:
    """Documents of 100 to 1,500 random tokens, packed: a data set of the recipes."""
    rng, documents, left = random.Random(0), [], rows * max_seq_len
    while left > 0:
        n = min(rng.randrange(100, 1500), left)
        documents.append(([rng.randrange(vocabulary) for _ in range(n)], None))
        left -= n
    return PackedRows(documents, max_seq_len)
