"""Bytes counted on the meta device against those of real tensors, on the CPU's path, which is the one there is here."""

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from mamba_hybrid import HybridMambaConfig, HybridMambaForCausalLM
from mamba_hybrid.model import Batch, HybridLayer, HybridMambaModel
from torchtune_recipes import activations
from torchtune_recipes.activations import Live, Shapes
from torchtune_recipes.models import Student, set_activation_checkpointing

SHAPE = dict(
    vocab_size=259, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2, head_dim=16, pad_token_id=None, layer_types=["linear_attention", "full_attention"],
)  # fmt: skip


class OnCPU(TorchFunctionMode):
    """In place of `OnGPU`: SDPA as a CPU has it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            q, k, v = args
            kwargs.pop("enable_gqa", None)
            mask = kwargs.pop("attn_mask", None)
            if mask is not None and mask.dtype == torch.bool:
                mask = torch.where(mask, 0.0, float("-inf"))
            op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            return op(q, k, v, 0.0, kwargs.get("is_causal", False), attn_mask=mask, scale=kwargs.get("scale"))[0]
        return func(*args, **kwargs)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(activations, "OnGPU", OnCPU)


def batch(B, L, N):
    doc_BL = (torch.arange(L) // 30).expand(B, L).contiguous()
    cos = torch.randn(B, L, N)
    return Batch(cos, cos.clone(), HybridMambaModel._mask(L, 0, None, doc_BL, doc_BL.device), doc_BL, None, None, None)


class Kept:
    """Bytes that autograd keeps, each storage once, without those of some tensors."""

    def __init__(self, *known):
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.sizes = {}

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def pack(self, t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return t

    @property
    def bytes(self):
        return sum(self.sizes.values())


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize(
    "more, B, L",
    [({}, 2, 128), ({"window": 0, "short_conv": 4, "state_heads": 2}, 2, 96), ({"window": 16, "gate": "silu"}, 3, 160)],
)
def test_what_a_layer_keeps(on_cpu, kind, more, B, L):
    config = HybridMambaConfig(**SHAPE | more)
    layer, b = HybridLayer(config, kind), batch(B, L, 16)
    h = torch.randn(B, L, 64, requires_grad=True)
    with Kept(h, b.cos, b.sin, b.mask, b.doc_BL, *layer.parameters()) as kept:
        out = layer(h, b)
    ours = Shapes(config, B, L, torch.float32).layer(kind, grad=True)
    # small tensors are rounded up to 512 bytes; its output is the next layer's input, which is not kept by this one
    assert ours.kept == pytest.approx(kept.bytes + out.nbytes, rel=0.03)
    assert ours.kept <= ours.backward and ours.kept <= ours.forward


def test_live_is_the_peak_of_what_is_alive():
    x = torch.ones(1024)
    with Live() as live:
        a = x * 2
        b = a * 2
        del a
        assert (live.now, live.peak) == (4096, 8192)
        c = b.view(32, 32)
        del b
        assert live.now == 4096
        del c
    assert live.now == 0


@pytest.mark.parametrize("again", [False, True])
def test_what_a_student_keeps_with_and_without_checkpointing(on_cpu, again):
    B, L = 2, 128
    config = HybridMambaConfig(**SHAPE | {"num_hidden_layers": 4, "layer_types": SHAPE["layer_types"] * 2})
    shapes = Shapes(config, B, L, torch.float32)
    student = Student(HybridMambaForCausalLM(config))
    if again:
        set_activation_checkpointing(student, auto_wrap_policy={HybridLayer})
    tokens = torch.randint(0, 259, (B, L))
    doc = torch.zeros_like(tokens)
    with Kept(*student.parameters(), doc, tokens) as kept:
        student(tokens, doc, tokens, (torch.randn(B * L, 64), torch.randn(259, 64)), chunk_tokens=64)
    hidden = shapes.hidden().nbytes
    layers = [hidden if again else shapes.layer(i, grad=True).kept for i in range(4)]
    loss = shapes.loss(config, chunk_tokens=64)
    # the last layer's output is kept for the norm, the norm's own is not: the loss keeps its gradient in its place
    ours = sum(layers) + hidden * again + shapes.norm().kept - hidden + loss.kept
    shared = shapes.shared() - doc.nbytes
    assert kept.bytes == pytest.approx(ours + (0 if again else shared), rel=0.02)


def test_on_a_gpu_the_ssd_keeps_its_inputs_and_nothing_of_a_chunk(monkeypatch):
    """Twice as many tokens, twice as much; and far less than the CPU's chunks by chunks."""
    config = HybridMambaConfig(**SHAPE | {"window": 0})
    one, two = (Shapes(config, 1, L, torch.bfloat16).layer(0, grad=True).kept for L in (512, 1024))
    assert two == pytest.approx(2 * one, rel=0.01)
    monkeypatch.setattr(activations, "OnGPU", OnCPU)
    assert two < 0.6 * Shapes(config, 1, 1024, torch.bfloat16).layer(0, grad=True).kept
