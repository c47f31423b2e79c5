"""Tiny checkpoints with random weights and a real tokenizer file, made on the spot."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"


def tokenizer(specials: tuple[str, ...] = ("<|end|>", "<|user|>", "<|assistant|>")) -> PreTrainedTokenizerFast:
    """One token a byte, and the chat's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(list(specials))
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=None, eos_token="<|end|>", pad_token="<|end|>", chat_template=CHAT
    )


SHAPE = dict(
    vocab_size=259,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    bos_token_id=None,
    eos_token_id=256,
    pad_token_id=None,
)
LLAMA3_ROPE = dict(
    rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip
FAMILIES = {
    "llama": lambda **k: LlamaForCausalLM(LlamaConfig(**SHAPE | k)),
    "llama3": lambda **k: LlamaForCausalLM(LlamaConfig(**SHAPE | dict(rope_parameters=LLAMA3_ROPE) | k)),
    "tied": lambda **k: LlamaForCausalLM(LlamaConfig(**SHAPE | dict(tie_word_embeddings=True) | k)),
    "mistral": lambda **k: MistralForCausalLM(MistralConfig(**SHAPE | dict(sliding_window=None) | k)),
    "qwen2": lambda **k: Qwen2ForCausalLM(Qwen2Config(**SHAPE | k)),
}


def save_transformer(out: Path, family: str = "llama", seed: int = 0, **changes) -> Path:
    """A directory with a random Transformer whose weights are big enough to matter."""
    torch.manual_seed(seed)
    model = FAMILIES[family](**changes)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (0.02 if "norm" in name else 0.15))
    model.generation_config.eos_token_id = 256
    model.save_pretrained(out)
    tokenizer().save_pretrained(out)
    return out


def save_text(path: Path, words: int = 3000, seed: int = 1) -> Path:
    """A .jsonl of passages of random words."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(1, 7))) for _ in range(60)]
    passages = [" ".join(rng.choices(vocabulary, k=30)) for _ in range(words // 30)]
    path.write_text("".join(json.dumps({"text": p + "\n"}) + "\n" for p in passages))
    return path
