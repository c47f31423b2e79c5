"""fp32 parameters that compute in bf16 on one process, against FSDP's mixed precision."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from mamba_hybrid import HybridMambaConfig, HybridMambaForCausalLM
from mamba_hybrid.model import HybridLayer
from torchtune_recipes.masters import compute_in
from torchtune_recipes.models import Student, Teacher, shard

CONFIG = dict(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    window=8, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], pad_token_id=None,
)  # fmt: skip


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def gradients(student, teacher):
    tokens_BL = torch.arange(96).view(2, 48) % 64
    doc_BL = (torch.arange(48) // 30).expand(2, 48)
    with torch.no_grad():
        target = teacher(tokens_BL, doc_BL)
    out = student(tokens_BL, doc_BL, tokens_BL.roll(-1, 1), target, chunk_tokens=50)
    out.loss.backward()
    return out.loss.detach(), {name: p.grad for name, p in student.named_parameters()}


@pytest.mark.parametrize("more", [{}, {"tie_word_embeddings": True, "short_conv": 4, "gate": "silu"}])
def test_loss_and_gradients_are_those_of_fsdp(mesh, more):
    torch.manual_seed(0)
    config = HybridMambaConfig(**CONFIG | more)
    model, teacher = HybridMambaForCausalLM(config), Teacher(HybridMambaForCausalLM(config))
    shard(teacher, mesh, torch.bfloat16)
    ours, theirs = (Student(copy.deepcopy(model)) for _ in range(2))
    shard(ours, mesh, torch.bfloat16, masters=True)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    exact = MixedPrecisionPolicy(torch.float32, torch.float32, cast_forward_inputs=False)
    for layer in (m for m in theirs.modules() if isinstance(m, HybridLayer)):
        if layer.is_mixer:
            fully_shard(layer.mixer.core, mesh=mesh, mp_policy=exact)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(theirs, mesh=mesh, mp_policy=policy)
    (mine, grads), (loss, others) = gradients(ours, teacher), gradients(theirs, teacher)
    assert torch.equal(mine, loss)
    for name, grad in grads.items():
        other = others[name].full_tensor()
        assert grad.dtype == other.dtype == torch.float32
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):  # fp32, by FSDP bf16
            torch.testing.assert_close(grad, other, rtol=0, atol=0.02 * float(other.abs().max()))
        else:
            assert torch.equal(grad, other), name


def test_a_module_of_another_kind_is_named():
    with pytest.raises(TypeError, match="LayerNorm has parameters"):
        compute_in(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), torch.bfloat16)


def test_layers_compile_whole(mesh, compile_with):
    """One graph for each kind of layer, with gradients and without; recomputation finds the same ones."""
    compile_with("aot_eager")
    torch.manual_seed(0)
    config = HybridMambaConfig(**CONFIG | {"num_hidden_layers": 4, "layer_types": CONFIG["layer_types"] * 2})
    model, teacher = HybridMambaForCausalLM(config), Teacher(HybridMambaForCausalLM(config))
    plain, compiled = (Student(copy.deepcopy(model)) for _ in range(2))
    shard(plain, mesh, torch.bfloat16, masters=True, checkpoint_activations=1)
    shard(compiled, mesh, torch.bfloat16, masters=True, compute_layers=True, checkpoint_activations=1)
    shard(teacher, mesh, torch.bfloat16, compute_layers=True)
    loss, grads = gradients(compiled, teacher)
    assert counters["stats"]["unique_graphs"] == 4 and not counters["graph_break"]
    expected, others = gradients(plain, teacher)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, others[name], rtol=0, atol=0.05 * float(others[name].abs().max()))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_layers_cast_again_instead_of_keeping(mesh, compile_with, compiled, frozen):
    """What the backward pass needs of a weight is the fp32 parameter itself, not a copy in the dtype; a layer's input
    it needs where the weight is trained."""
    compile_with("aot_eager")
    torch.manual_seed(0)
    model, kept = Student(HybridMambaForCausalLM(HybridMambaConfig(**CONFIG))), []
    shard(model, mesh, torch.bfloat16, masters=True, compute_layers=compiled)
    model.requires_grad_(not frozen)
    hidden_BTD = torch.randn(2, 48, 64, dtype=torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out_BTD = model.model.model(inputs_embeds=hidden_BTD).last_hidden_state
    weights = [m.weight for m in model.model.model.layers.modules() if isinstance(m, nn.Linear)]
    assert {w.data_ptr() for w in weights} <= {t.data_ptr() for t in kept}
    sizes = {w.numel() for w in weights}  # no activation has as many numbers
    assert not [t.shape for t in kept if t.dtype == torch.bfloat16 and t.numel() in sizes]
    widths = [t.numel() // 96 for t in kept if t.dtype == torch.bfloat16]
    if not compiled:  # a graph may keep silu(gate) up instead of making it again
        assert (widths.count(128) == 2 * 3) == frozen
    out_BTD.float().sum().backward()
    assert hidden_BTD.grad.isfinite().all() and all((w.grad is None) == frozen for w in weights)
