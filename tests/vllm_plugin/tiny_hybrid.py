"""Tiny hybrids with random weights on disk, and what transformers generates with them.

Their weights are drawn so that the state matters and that the best and the second-best token are far apart.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mamba_hybrid import HybridMambaConfig, HybridMambaForCausalLM
from mamba_hybrid.checkpoint import load_model, save_model

VOCAB = 512
SPECIAL = ["<pad>", "<s>", "</s>", "user", "assistant", ":"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
KINDS = {
    # states shared by the query heads of a group, a short window, a convolution, biases as Qwen2 has them
    "shared": {"window": 16, "state_heads": 2, "short_conv": 4, "qkv_bias": True},
    # a state per query head, the default window, llama3's rope
    "heads": {
        "window": 64,
        "state_heads": 4,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    },
    # the paper's block
    "paper": {"window": 0, "state_heads": 4, "short_conv": 4, "gate": "silu", "norm": "after_gate"},
}

SEEDS = {"shared": 2, "heads": 2, "paper": 2}  # that keep the best two tokens of the tests' prompts apart


def write_tokenizer(out: Path) -> None:
    """One word a token: w6 is token 6."""
    words = SPECIAL + [f"w{i}" for i in range(len(SPECIAL), VOCAB)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    fast.save_pretrained(out)


def text(tokens: list[int]) -> str:
    """A prompt that the tokenizer turns into these tokens (none of them special)."""
    return " ".join(f"w{t}" for t in tokens)


def write_hybrid(out: Path, kind: str, layers: str = "AMMA", **changes) -> Path:
    """A hybrid's directory; `layers` has A for attention, M for a mixer."""
    config = HybridMambaConfig(
        architectures=["HybridMambaForCausalLM"],
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=len(layers),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=changes.pop("max_position_embeddings", 1024),
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        layer_types=["linear_attention" if kind == "M" else "full_attention" for kind in layers],
        **(KINDS[kind] | changes),
    )
    torch.manual_seed(SEEDS[kind])
    model = HybridMambaForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            last = name.rsplit(".", 1)[-1]
            if ".core." in name:
                if last == "A_log":  # half-lives of a few to a few hundred tokens
                    p.copy_(torch.rand_like(p) * -4 - 1)
                elif last == "conv_silu":
                    p.fill_(0.5)
                elif last == "conv_weight":
                    p.add_(torch.randn_like(p) * 0.3)
                else:
                    p.add_(torch.randn_like(p) * 0.2)
            elif "norm" in name:
                p.copy_(1 + torch.randn_like(p) * 0.1)
            elif last == "bias":
                p.normal_(std=0.3)
            elif "embed_tokens" in name:
                p.normal_(std=1)
            elif "lm_head" in name:
                p.normal_(std=0.7)
            else:
                p.normal_(std=1.2 / p.shape[1] ** 0.5)
    source = out.parent / f".{out.name}.tokenizer"
    write_tokenizer(source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 0}))
    save_model(out, config, model.state_dict().items(), source)
    return out


def write_noisy(out: Path, hybrid: Path, noise: float) -> Path:
    """A copy of a hybrid whose matrices are off by a share `noise`, so that it often agrees with it."""
    model = load_model(hybrid)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.add_(torch.randn_like(p) * p.std() * noise)
    save_model(out, model.config, model.state_dict().items(), hybrid)
    return out


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random prompts without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(len(SPECIAL), VOCAB, (n,), generator=generator).tolist() for n in lengths]


def reference(model: HybridMambaForCausalLM, prompt: list[int], new: int) -> tuple[list[int], float]:
    """`new` greedy tokens of transformers' generate, and the smallest gap between best and second-best logit."""
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    top = torch.stack(out.logits).float().topk(2, -1).values
    return out.sequences[0, len(prompt) :].tolist(), (top[..., 0] - top[..., 1]).min().item()
