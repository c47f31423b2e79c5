"""CompiledAdamW against PyTorch's fused AdamW."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from torchtune_recipes.adamw import CompiledAdamW

SHAPES = ((64, 32), (7,), (3, 5, 2), ())


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no-clip"])
def test_steps_as_the_fused_one(clip):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]

    def groups(p: list[nn.Parameter]) -> list[dict]:
        return [{"params": p[:2], "lr": 1e-2}, {"params": p[2:], "lr": 1e-3, "weight_decay": 0.0}]

    optimizer = CompiledAdamW(groups(ours), betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    reference = torch.optim.AdamW(groups(theirs), betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, fused=True)
    for step in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        if clip:
            optimizer.grad_scale = reference.grad_scale = torch.tensor(1.0 + step)
        optimizer.step()
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6)
        for group, other in zip(optimizer.param_groups, reference.param_groups, strict=True):  # a schedule
            group["lr"].fill_(float(group["lr"]) * 0.9)
            other["lr"] *= 0.9
    assert counters["stats"]["unique_graphs"] == 1  # nothing is compiled anew, in no pieces


def test_a_parameter_without_gradient_stays():
    torch._dynamo.reset()
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    q.grad = torch.ones(3)
    optimizer = CompiledAdamW([p, q])
    optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3)) and (q.detach() < 1).all()
    assert p not in optimizer.state


def test_takes_no_closure():
    with pytest.raises(TypeError, match="closure"):
        CompiledAdamW([nn.Parameter(torch.ones(3))]).step(lambda: 0.0)
