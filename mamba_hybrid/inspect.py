"""What a checkpoint is made of and what a sequence costs when it is served."""

from __future__ import annotations

from pathlib import Path

import torch

from .config import HybridMambaConfig
from .errors import UserError
from .model import HybridMambaForCausalLM
from .source import hybrid_config, open_source

MIB = 2**20


def inspect(path: str | Path, *, context: int | None = None, drafts: int = 0) -> str:
    """Describe a checkpoint: layers, parameters, and bytes of state and KV cache of one sequence.

    Args:
        path: a hybrid, or a plain Llama, Mistral or Qwen2.
        context: tokens of the sequence; None for the model's limit.
        drafts: drafted tokens a step, which widen the ring.

    Returns:
        A text of several lines.

    Raises:
        UserError: the checkpoint cannot be read, or a number is out of range.
    """
    source = open_source(path)
    config = hybrid_config(source.config)
    context = config.max_position_embeddings if context is None else context
    for flag, value, least in (("--context", context, 1), ("--drafts", drafts, 0)):
        if value < least:
            raise UserError(f"{flag} {value} must be at least {least}")
    dtype = _dtype(config)
    layout = config.slot_layout(dtype=dtype, step=drafts + 1, rewind=drafts + 1 if drafts else 0)
    mixers, n = config.mixer_layers, config.num_hidden_layers
    kv_token = 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
    kept = n - len(mixers)
    counts = _parameters(config)
    state, kv, full = len(mixers) * layout.bytes(), kept * kv_token * context, n * kv_token * context
    lines = [
        f"{path}: {source.config.model_type}, {sum(counts.values()) / 1e6:.1f} M parameters, {str(dtype)[6:]}",
        f"layers       {n}: {kept} attention {[i for i in range(n) if i not in mixers]}, {len(mixers)} mixers {mixers}",
        f"heads        {config.num_attention_heads} query, {config.num_key_value_heads} key/value, "
        f"{config.state_heads} states of {config.head_dim} x {config.state_size}; head width {config.head_dim}",
        f"mixer        window {config.window}, ring {layout.ring} rows, short_conv {config.short_conv}, "
        f"gate {config.gate}, norm {config.norm}, rope {config.ssm_rope}",
    ]
    lines += [f"{part:12} {count / 1e6:.2f} M" for part, count in counts.items() if count]
    lines += [
        f"a sequence of {context} tokens:",
        f"  state      {state / MIB:.2f} MiB ({len(mixers)} x {layout.bytes() / 1024:.1f} KiB, whatever its length)",
        f"  KV cache   {kv / MIB:.2f} MiB ({kept} x {kv_token} bytes a token)",
        f"  together   {(state + kv) / MIB:.2f} MiB, all layers attention: {full / MIB:.2f} MiB",
    ]
    return "\n".join(lines)


def _dtype(config: HybridMambaConfig) -> torch.dtype:
    dtype = config.dtype
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype or "float32").removeprefix("torch."))


def _parameters(config: HybridMambaConfig) -> dict[str, int]:
    """Counted on a model without memory: a 70B is inspected as fast as a 1B."""
    with torch.device("meta"):
        model = HybridMambaForCausalLM(config)
    counts = {"embeddings": 0, "attention": 0, "mixers": 0, "mlp": 0, "norms": 0}
    kinds = (("mixer", "mixers"), ("self_attn", "attention"), ("mlp", "mlp"), ("norm", "norms"))
    for name, parameter in model.named_parameters():
        part = next((part for key, part in kinds if key in name), "embeddings")
        counts[part] += parameter.numel()
    return counts
