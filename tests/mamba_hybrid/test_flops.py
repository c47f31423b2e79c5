"""FLOPs by formula against PyTorch's counter of the operations that it knows: matrix products and attention."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mamba_hybrid import HybridMambaConfig, HybridMambaForCausalLM
from mamba_hybrid.flops import (
    alignment_flops,
    distillation_flops,
    forward_flops,
    gates_flops,
    peak_flops,
    preference_flops,
    trials_flops,
)
from mamba_hybrid.logprob import sequence_log_probs
from mamba_hybrid.loss import distillation_loss
from mamba_hybrid.mixer import HybridMixer
from torchtune_recipes.gates import Gated, Gates

SHAPE = dict(
    vocab_size=259, hidden_size=48, intermediate_size=96, num_attention_heads=6, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=512, pad_token_id=None,
)  # fmt: skip
B, L = 2, 64


def model(kinds: str, **more) -> HybridMambaForCausalLM:
    types = [{"a": "full_attention", "m": "linear_attention"}[k] for k in kinds]
    return HybridMambaForCausalLM(
        HybridMambaConfig(**SHAPE | {"num_hidden_layers": len(kinds), "layer_types": types} | more)
    )


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # as the products that it is
        run()
    return counter.get_total_flops()


def causal(config, length) -> float:
    """What the counter, which does not know of causality, counts too much in a forward pass."""
    kept = config.num_hidden_layers - len(config.mixer_layers)
    return kept * 2 * config.num_attention_heads * 2 * config.head_dim * length / 2


def test_forward_of_a_transformer():
    m = model("aaa")
    tokens = torch.randint(0, 259, (B, L))
    with torch.no_grad():
        seen = counted(lambda: m(tokens))
    assert seen == B * L * (forward_flops(m.config, L) + causal(m.config, L))


@pytest.mark.parametrize("frozen", [(), ("mlp",), ("embeddings", "attention")])
def test_distillation_of_a_transformer(frozen):
    student, teacher = model("aa"), model("a", hidden_size=32)
    tokens = torch.randint(0, 259, (B, L))
    for name, p in student.named_parameters():
        part = next(
            (part for key, part in (("mlp", "mlp"), ("self_attn", "attention"), ("norm", "norms")) if key in name),
            "embeddings",
        )
        p.requires_grad_(part not in frozen)

    def step():
        with torch.no_grad():
            t = teacher.model(tokens).last_hidden_state.flatten(0, 1)
        # the first layer's input needs a gradient too where embeddings are trained
        h = student.model(inputs_embeds=student.model.embed_tokens(tokens).requires_grad_()).last_hidden_state
        distillation_loss(
            h.flatten(0, 1), student.lm_head.weight, t, teacher.lm_head.weight, tokens.flatten()
        ).loss.backward()

    ours = distillation_flops(student.config, teacher.config, L, lambda part: part not in frozen)
    ours += 3 * causal(student.config, L) + causal(teacher.config, L)
    assert counted(step) == B * L * ours


def test_a_mixers_projections_forward_and_backward():
    """Window and SSD cannot be counted (another algorithm runs on a CPU), so they are taken off on both sides."""
    m = model("m", gate="silu", state_heads=2)
    mixer = m.model.layers[0].mixer
    u = torch.randn(B, L, 48)

    def projections():
        q, k, v, dt, z = mixer.project(u)
        loss = mixer.o_proj(torch.ones(B, L, 48, requires_grad=True)).sum() + sum(t.sum() for t in (q, k, v, dt, z))
        loss.backward()

    none = model("a")  # as its own teacher: two forward passes without head, to take off
    short = model("m", gate="silu", state_heads=2, window=0)
    ours = alignment_flops(m.config, none.config, L) - forward_flops(none.config, L, head=False)
    mixing = forward_flops(m.config, L, head=False) - 2 * sum(
        p.numel() for n, p in m.model.layers.named_parameters() if p.dim() == 2 and ".core." not in n
    )
    assert counted(projections) == B * L * (ours - 3 * mixing)
    # the window is L W for each head and of its two products, but for the row's start
    window = mixing - (
        forward_flops(short.config, L, head=False)
        - 2 * sum(p.numel() for n, p in short.model.layers.named_parameters() if p.dim() == 2 and ".core." not in n)
    )
    pairs = sum(min(t + 1, 64) for t in range(L))
    assert window * L == 2 * 6 * (8 + 8) * pairs


def test_alignment_ends_with_the_last_mixer():
    student = model("maa").config
    assert alignment_flops(student, model("aaa").config, L) == alignment_flops(student, model("a").config, L)


@pytest.mark.parametrize("share", [1, 4])
def test_preferences_of_a_transformer(share):
    """The logits that the backward pass makes again are no model FLOPs."""
    student, reference = model("aa"), model("a", hidden_size=32)
    tokens = torch.randint(0, 259, (B, L))
    at = torch.arange(0, B * L, share)

    def log_probs(m, h):
        return sequence_log_probs(h.flatten(0, 1)[at], m.lm_head.weight, tokens.flatten()[at], torch.tensor([len(at)]))

    def step():
        with torch.no_grad():
            log_probs(reference, reference.model(tokens).last_hidden_state)
        h = student.model(inputs_embeds=student.model.embed_tokens(tokens).requires_grad_()).last_hidden_state
        log_probs(student, h).sum().backward()

    ours = preference_flops(student.config, reference.config, L, headed=1 / share)
    again = 2 * 48 * 259 / share
    ours += 3 * causal(student.config, L) + causal(reference.config, L) + again
    assert counted(step) == B * L * ours
    alone = preference_flops(student.config, None, L)
    assert alone + forward_flops(reference.config, L) == preference_flops(student.config, reference.config, L)


@pytest.mark.parametrize("asked", [0, 4])
def test_gates_between_attention_and_mixers(asked):
    """Window and SSD are counted alone, as another algorithm has them, and taken off on both sides."""
    student, teacher = model("mm", window=16), model("aa")
    gated = Gated(student.requires_grad_(False), teacher.requires_grad_(False), Gates(2, 1, rounds=1))
    mixers = [m for m in gated.modules() if isinstance(m, HybridMixer)]
    tokens, doc = torch.randint(0, 259, (B, L)), torch.zeros(B, L, dtype=torch.int64)
    places = torch.arange(asked).expand(B, -1)

    def step():
        with torch.no_grad():
            target = teacher.model(tokens, document_ids=doc).last_hidden_state.flatten(0, 1), teacher.lm_head.weight
        gated("imitate", 1.0, tokens, doc, tokens, target)[0].loss.backward()
        if asked:
            gated("recall", 1.0, tokens, places, places)[0].backward()

    projected = mixers[0].project(torch.randn(B, L, 48))

    def cores(grad):
        q, k, v, dt, z = (t.detach().requires_grad_(grad) for t in projected)
        cos = torch.randn(B, L, 8)
        out = mixers[0].core(q, k, v, dt, z, cos, cos, doc)[0]
        if grad:
            out.sum().backward()

    passes = 1 + bool(asked)
    seen = counted(step) - passes * (counted(lambda: cores(False)) + counted(lambda: cores(True)))
    short = model("m", window=16)
    weights = sum(p.numel() for n, p in short.model.layers.named_parameters() if p.dim() == 2 and ".core." not in n)
    mixing = forward_flops(short.config, L, head=False) - 2 * weights
    attention = causal(model("a").config, L)
    ours = gates_flops(model("mm", window=16).config, teacher.config, L, asked=asked)
    ours += 2 * attention + passes * ((1 + 3) * attention - (1 + 3) * mixing)
    assert seen == B * L * ours


def test_trials_are_forward_passes():
    mixers, teacher = model("mmm").config, model("aaa").config
    one = sum(forward_flops(model(kinds).config, L) for kinds in ("aaa", "mam", "aam", "maa"))
    assert trials_flops(mixers, teacher, L, chosen=1) == pytest.approx(one)


def test_ssd_is_the_chunked_algorithm():
    """Written out as loops over a chunk's pairs, for a row of two whole chunks."""
    m = model("m", window=0, state_heads=2)
    length = 256
    mixing = forward_flops(m.config, length, head=False) - 2 * sum(
        p.numel() for n, p in m.model.layers.named_parameters() if p.dim() == 2 and ".core." not in n
    )
    pairs = 2 * 128 * 128 / 2  # (query, key) pairs of the chunks, causal
    expected = 6 * pairs * (2 * 8 + 2 * 8) + length * (2 * 2 * 8 * 8 + 2 * 6 * 8 * 8)
    assert mixing * length == expected


def test_peaks_are_of_known_devices_only():
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989e12
    assert peak_flops("NVIDIA H100 PCIe", torch.bfloat16) == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float32) == 156e12
    assert peak_flops("Some GPU", torch.bfloat16) is None
