"""Model FLOPs of training: what a step needs by its formulas, not what an implementation happens to do.

Shapes: L tokens of a row, D model width, I MLP width, V vocabulary, H query heads, G key/value heads, S state heads, P
head width, N state width, W window, Q tokens of a chunk.

A product of (m, k) and (k, n) is 2 m k n. Forward, of one token:

    a matrix of n weights        2 n
    attention, causal            2 H (P + P) L/2           (each query sees half of the row)
    window attention             2 H (N + P) W             (W: what a query sees of it on average)
    SSD in chunks of Q           2 H (N + P) Q/2           (C B^T and its product with x, causal within the chunk)
                               + 2 S P N + 2 H P N         (the chunk's gain to the states, C read from them)

Backward, a product costs its forward once for the gradient of each of its two operands that needs one: a trained
matrix twice, a frozen one once, attention, window and SSD twice. Recomputation (activation checkpointing) is no model
FLOP; document borders are not taken off; norms, gates, rotations and softmax are not counted, nor is the optimiser.

Source: Chowdhery et al. 2022 (arXiv 2204.02311), appendix B, for the definition; Dao & Gu 2024 (arXiv 2405.21060),
section 6, for the SSD's chunks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .config import HybridMambaConfig

CHUNK = 128  # of the GPU's SSD

# dense bf16 and TF32 FLOP/s by how a device's name begins, from NVIDIA's data sheets; the first that fits
PEAKS = (
    ("NVIDIA B200", 2250e12, 1125e12),
    ("NVIDIA H200", 989e12, 494.5e12),
    ("NVIDIA GH200", 989e12, 494.5e12),
    ("NVIDIA H100 PCIe", 756e12, 378e12),
    ("NVIDIA H100 NVL", 835e12, 417.5e12),
    ("NVIDIA H100", 989e12, 494.5e12),
    ("NVIDIA A100", 312e12, 156e12),
    ("NVIDIA L40S", 362e12, 183e12),
)


def peak_flops(device: str, dtype: torch.dtype) -> float | None:
    """FLOP/s that a GPU of that name can do in that dtype (fp32: TF32), None for one that is not in `PEAKS`."""
    for name, half, single in PEAKS:
        if device.startswith(name):
            return single if dtype == torch.float32 else half
    return None


def _matrices(config: HybridMambaConfig, layer: int) -> dict[str, int]:
    """Weights of a layer's matrices by the parts that `freeze` names."""
    D, H, G, P = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    mlp = 3 * D * config.intermediate_size
    if layer not in config.mixer_layers:
        return {"attention": 2 * D * H * P + 2 * D * G * P, "mlp": mlp}
    return {"mixers": _mixer_inputs(config) + H * P * D, "mlp": mlp}


def _mixer_inputs(config: HybridMambaConfig) -> int:
    """Weights of a mixer's projections that read the hidden state."""
    H, G, P, N = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.state_size
    gate = 0 if config.gate == "none" else H * P
    return config.hidden_size * (H * N + G * N + G * P + gate + config.state_heads)


def _mixing(config: HybridMambaConfig, layer: int, length: int) -> float:
    """Forward FLOPs of one token in a layer's attention, or window and SSD, without projections."""
    H, P, N, S = config.num_attention_heads, config.head_dim, config.state_size, config.state_heads
    if layer not in config.mixer_layers:
        return 2 * H * (P + P) * length / 2
    w = min(config.window, length)
    seen = w - w * (w - 1) / (2 * length)
    chunk = min(CHUNK, length)
    return 2 * H * (N + P) * (seen + chunk / 2) + 2 * P * N * (S + H)


def forward_flops(config: HybridMambaConfig, length: int, *, head: bool = True, layers: int | None = None) -> float:
    """FLOPs of one token's forward pass.

    Args:
        config: the model's.
        length: L of the row that it is in.
        head: with the language-model head.
        layers: only the first so many.
    """
    count = config.num_hidden_layers if layers is None else layers
    total = sum(2 * sum(_matrices(config, i).values()) + _mixing(config, i, length) for i in range(count))
    return total + (2 * config.hidden_size * config.vocab_size if head else 0)


def distillation_flops(
    student: HybridMambaConfig,
    teacher: HybridMambaConfig,
    length: int,
    trains: Callable[[str], bool] = lambda part: True,
) -> float:
    """FLOPs of one token of a KD-SFT step: the teacher's forward pass, the student's forward and backward pass.

    Args:
        student, teacher: the models' configurations.
        length: L.
        trains: whether a part ("embeddings", "attention", "mixers", "mlp") is trained.

    Example:
        >>> config = HybridMambaConfig(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
        >>> distillation_flops(config, config, 128) == 4 * forward_flops(config, 128)
        True
    """
    return forward_flops(teacher, length) + _trained_flops(student, length, trains, 1.0)


def _trained_flops(student: HybridMambaConfig, length: int, trains: Callable[[str], bool], headed: float) -> float:
    """FLOPs of one token of a model's forward and backward pass, the head on so large a share of the tokens."""
    total = 0.0
    for i in range(student.num_hidden_layers):
        total += 3 * _mixing(student, i, length)
        for part, weights in _matrices(student, i).items():
            total += 2 * weights * (3 if trains(part) else 2)
    return total + headed * 2 * student.hidden_size * student.vocab_size * (3 if trains("embeddings") else 2)


def preference_flops(
    student: HybridMambaConfig,
    reference: HybridMambaConfig | None,
    length: int,
    trains: Callable[[str], bool] = lambda part: True,
    *,
    headed: float = 1.0,
) -> float:
    """FLOPs of one token of a DPO step: the reference's forward pass, the student's forward and backward pass.

    Args:
        student, reference: the models' configurations, None where the loss takes no reference.
        length: L.
        trains: as `distillation_flops`.
        headed: share of the tokens that have an answer's token to predict; only they see a head.
    """
    total = _trained_flops(student, length, trains, headed)
    if reference is None:
        return total
    head = headed * 2 * reference.hidden_size * reference.vocab_size
    return total + forward_flops(reference, length, head=False) + head


def alignment_flops(student: HybridMambaConfig, teacher: HybridMambaConfig, length: int) -> float:
    """FLOPs of one token of an alignment step: the teacher's forward pass up to the last layer that something is learnt
    from, the mixers' forward and backward pass, in which what they read needs no gradient."""
    total = forward_flops(teacher, length, head=False, layers=max(student.mixer_layers, default=-1) + 1)
    out = student.num_attention_heads * student.head_dim * student.hidden_size
    for i in student.mixer_layers:
        total += 2 * (2 * _mixer_inputs(student) + 3 * out) + 3 * _mixing(student, i, length)
    return total


def gates_flops(student: HybridMambaConfig, teacher: HybridMambaConfig, length: int, *, asked: int = 0) -> float:
    """FLOPs of one token of a selection step by gates: the teacher's forward pass, and of the student, all frozen, with
    a mixer and the teacher's attention in each layer, the forward and backward pass; and that again on rows of recall.

    Args:
        student: with mixers only.
        teacher: with attention only, of the same shape.
        length: L.
        asked: tokens that a row of recall is asked for, 0 for no such rows.
    """
    layers = 0.0
    for i in range(student.num_hidden_layers):
        mine, theirs = _matrices(student, i), _matrices(teacher, i)
        both = 2 * (mine["mixers"] + theirs["attention"])
        mixing = _mixing(student, i, length) + _mixing(teacher, i, length)
        # what the first layer's attention and mixer read needs no gradient
        layers += 2 * 2 * mine["mlp"] + (both + mixing if i == 0 else 2 * both + 3 * mixing)
    head = 2 * 2 * student.hidden_size * student.vocab_size
    recall = layers + head * asked / length if asked else 0.0
    return forward_flops(teacher, length) + layers + head + recall


def trials_flops(student: HybridMambaConfig, teacher: HybridMambaConfig, length: int, chosen: int) -> float:
    """FLOPs of one token of a selection step by trials: forward passes of the teacher, of the student with the chosen
    layers' attention, and of the student with each other layer's besides.

    Args:
        student, teacher, length: as `gates_flops`.
        chosen: layers chosen in the rounds before.
    """

    def forward(open_layers: int) -> float:
        mixers, attention = (forward_flops(m, length, head=False, layers=1) for m in (student, teacher))
        rest = student.num_hidden_layers - open_layers
        return open_layers * attention + rest * mixers + 2 * student.hidden_size * student.vocab_size

    left = student.num_hidden_layers - chosen
    return forward_flops(teacher, length) + forward(chosen) + left * forward(chosen + 1)
