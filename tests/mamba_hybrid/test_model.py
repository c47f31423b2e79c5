import pytest
import torch
from mamba_hybrid_kernels import PackedDocuments, document_starts
from transformers import AutoModelForCausalLM, TorchAoConfig

from mamba_hybrid import HybridMambaConfig, HybridMambaForCausalLM
from tests.tiny import LLAMA3_ROPE, SHAPE

KINDS = {
    "default": {},
    "no window": dict(window=0),
    "shared states": dict(state_heads=2),
    "short conv": dict(short_conv=4),
    # eps is raised: its norm comes after everything, so rounding of a small output is otherwise blown up
    "paper": dict(gate="silu", norm="after_gate", window=0, short_conv=4, ssm_rope=False, rms_norm_eps=1e-2),
    "no gate": dict(gate="none"),
    "qkv bias": dict(qkv_bias=True),
    "wide state": dict(window=0, state_size=16, ssm_rope=False),
    "llama3 rope": dict(rope_parameters=LLAMA3_ROPE),
}


def tiny(window: int = 8, **kind) -> HybridMambaForCausalLM:
    torch.manual_seed(0)
    config = HybridMambaConfig(
        **SHAPE | dict(layer_types=["linear_attention", "full_attention"] * 2, window=window, eos_token_id=None) | kind
    )
    model = HybridMambaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (0.1 if "core" in name else 0.05))
    return model


def prompts() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randint(0, 256, (n,)) for n in (40, 3, 100, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_cached_generation_left_padding_and_full_passes_agree(kind):
    model, ids = tiny(**KINDS[kind]), prompts()
    length = max(map(len, ids))
    batch, mask = torch.zeros(2, len(ids), length, dtype=torch.long)
    for row, t in enumerate(ids):
        batch[row, length - len(t) :], mask[row, length - len(t) :] = t, 1
    together = model.generate(batch, attention_mask=mask, max_new_tokens=30, do_sample=False)
    for row, t in enumerate(ids):
        alone = model.generate(t[None], max_new_tokens=30, do_sample=False)[0]
        assert torch.equal(alone[len(t) :], together[row, length:])
        with torch.no_grad():
            full = model(alone[None, :-1]).logits.argmax(-1)[0, len(t) - 1 :]
        assert torch.equal(full, alone[len(t) :])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_packed_documents_equal_single_ones(kind):
    model, ids = tiny(**KINDS[kind]), prompts()
    doc = torch.cat([torch.full((len(t),), i) for i, t in enumerate(ids)])[None]
    packed = model(torch.cat(ids)[None], document_ids=doc).logits[0]
    begun = PackedDocuments(doc, document_starts(doc, *doc.shape, doc.device))
    assert torch.equal(model(torch.cat(ids)[None], document_ids=begun).logits[0], packed)
    apart = torch.cat([model(t[None]).logits[0] for t in ids])
    largest = float(apart.abs().max())
    assert largest > 1
    torch.testing.assert_close(packed / largest, apart / largest, rtol=0, atol=1e-5)


def test_beam_search_reorders_slots():
    """Every beam's score must be what a pass over the whole sequence gives it."""
    model, ids = tiny(), prompts()[0]
    out = model.generate(
        ids[None], num_beams=3, num_return_sequences=3, max_new_tokens=12, do_sample=False,
        return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
    )  # fmt: skip
    for sequence, score in zip(out.sequences, out.sequences_scores, strict=True):
        with torch.no_grad():
            logp = model(sequence[None, :-1]).logits[0].log_softmax(-1)
        own = logp.gather(-1, sequence[1:, None])[len(ids) - 1 :].sum()
        torch.testing.assert_close(own, score, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind, tmp_path):
    model = tiny(**KINDS[kind])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert isinstance(again, HybridMambaForCausalLM)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_cores_stay_fp32_in_bf16(tmp_path):
    tiny().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    core = model.model.layers[0].mixer.core
    assert {p.dtype for p in core.parameters()} == {torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.generate(prompts()[0][None], max_new_tokens=5, do_sample=False).shape == (1, 45)


def test_gradients_reach_every_parameter():
    model = tiny(short_conv=4)
    ids = prompts()[2][None]
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


def test_first_window_is_the_attention_itself():
    """At near weight 1 a mixer puts out the teacher's attention until a token leaves the window."""
    torch.manual_seed(0)
    base = dict(SHAPE, eos_token_id=None)
    hybrid = HybridMambaForCausalLM(HybridMambaConfig(**base, layer_types=["linear_attention"] * 4, window=16)).eval()
    whole = HybridMambaForCausalLM(HybridMambaConfig(**base)).eval()
    whole.load_state_dict({k.replace("mixer.", "self_attn."): v for k, v in hybrid.state_dict().items()}, strict=False)
    ids = prompts()[2][None]
    with torch.no_grad():
        a, b = hybrid(ids).logits[0], whole(ids).logits[0]
    torch.testing.assert_close(a[:16], b[:16], rtol=1e-4, atol=1e-5)
    assert (a[17:] - b[17:]).abs().max() > 1e-3


def test_bad_calls():
    model, ids = tiny(), prompts()[0][None]
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="document_ids"):
        model(ids, document_ids=torch.zeros_like(ids), use_cache=True)
    with pytest.raises(ValueError, match="padding on the left"):
        model(ids, attention_mask=torch.cat([torch.zeros(1, 1), torch.ones(1, 39)], 1))
    with pytest.raises(ValueError, match="cache_implementation 'static'"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)


def test_quantisers_leave_the_step_sizes_alone(tmp_path):
    """Without being told to; and that costs fp16, in which transformers then keeps this projection in fp32, nothing."""
    torchao = pytest.importorskip("torchao.quantization")
    tiny().save_pretrained(tmp_path / "model")
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config)
    mixer = quantised.model.layers[0].mixer
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model").model.layers[0].mixer
    assert type(mixer.q_proj.weight.data) is not torch.Tensor and type(mixer.z_proj.weight.data) is not torch.Tensor
    assert type(mixer.dt_proj.weight.data) is torch.Tensor and torch.equal(mixer.dt_proj.weight, plain.dt_proj.weight)
    assert all(p.dtype == torch.float32 and type(p.data) is torch.Tensor for p in mixer.core.parameters())
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float16)
    assert half.model.layers[0].mixer.q_proj.weight.dtype == torch.float16
    assert half.generate(prompts()[0][None], max_new_tokens=2, do_sample=False).shape == (1, 42)
