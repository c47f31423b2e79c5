"""`ssd` on a GPU: the Triton kernels, and mamba-ssm's as the baseline, against the reference in fp64."""

import importlib.util

import pytest
import torch
from mamba_hybrid_kernels import ssd

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def check(heads, L, P, N, kind, w, dtype, tolerance, backend="triton", batch=2):
    """Outputs, final states and all gradients of a random case."""
    torch.manual_seed(L + w)
    G, S, H = heads
    x, B, C = (torch.randn(batch, L, n, d, device="cuda").to(dtype) for n, d in ((G, P), (G, N), (H, N)))
    dt, A = torch.rand(batch, L, S, device="cuda"), -torch.rand(S, device="cuda") * 0.2
    D = torch.randn(H, device="cuda")
    doc = (torch.rand(batch, L, device="cuda") < 0.02).long().cumsum(1) if kind == "packed" else None
    state = [torch.randn(batch, S, P, N, device="cuda")] if kind == "started" else []
    ours = [t.clone().requires_grad_() for t in (x, dt, A, B, C, D, *state)]
    twins = [t.double().requires_grad_() for t in (x, dt, A, B, C, D, *state)]
    results = [
        ssd(*t[:6], delay=w, doc_BL=doc, state_BSPN=t[6] if state else None, backend=name)
        for t, name in ((ours, backend), (twins, "reference"))
    ]
    assert results[0][0].dtype == dtype and results[0][1].dtype == torch.float32
    dy, dlast = (torch.randn_like(t) for t in results[0])
    grads = [
        torch.autograd.grad((y * dy.to(y.dtype)).sum() + (last * dlast.to(last.dtype)).sum(), leaves)
        for (y, last), leaves in zip(results, (ours, twins), strict=True)
    ]
    names = ("y", "last", "x", "dt", "A", "B", "C", "D", "state")
    for name, got, want in zip(names, (*results[0], *grads[0]), (*results[1], *grads[1]), strict=False):
        # A's gradient is a sum over all tokens in which most cancels
        allowed = (5 if name == "A" else 1) * tolerance
        assert (got - want).norm() <= allowed * want.norm(), (name, ((got - want).norm() / want.norm()).item())


@pytest.mark.parametrize("heads", [(2, 2, 8), (3, 9, 9), (2, 4, 8)])
@pytest.mark.parametrize("kind", ["plain", "packed", "started"])
@pytest.mark.parametrize("w", [0, 64])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_triton_equals_the_reference(heads, kind, w, dtype, tolerance):
    check(heads, 300, 64, 64, kind, w, dtype, tolerance)


@pytest.mark.parametrize("S", [8, 32])
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_heads_of_an_8b_model(S, kind):
    check((8, S, 32), 300, 128, 128, kind, 64, torch.bfloat16, 2e-2)


def test_long_sequences_lose_no_accuracy():
    check((1, 2, 4), 8192, 64, 64, "plain", 64, torch.bfloat16, 2e-2, batch=1)


def test_triton_is_deterministic():
    torch.manual_seed(0)
    x, B, C = (torch.randn(2, 500, n, 64, device="cuda", dtype=torch.bfloat16) for n in (2, 2, 8))
    dt, A, D = torch.rand(2, 500, 4, device="cuda"), -torch.rand(4, device="cuda"), torch.randn(8, device="cuda")
    leaves = [t.requires_grad_() for t in (x, dt, A, B, C, D)]
    runs = []
    for _ in range(3):
        y, last = ssd(*leaves, delay=3)
        runs.append((y, last, *torch.autograd.grad(y.float().sin().sum() + last.sin().sum(), leaves)))
    assert all(torch.equal(one, other) for run in runs[1:] for one, other in zip(runs[0], run, strict=True))


def test_triton_compiles_into_one_graph():
    torch.manual_seed(0)
    x, B, C = (torch.randn(2, 200, n, 64, device="cuda", dtype=torch.bfloat16) for n in (2, 2, 8))
    dt, A, D = torch.rand(2, 200, 2, device="cuda"), -torch.rand(2, device="cuda"), torch.randn(8, device="cuda")
    leaves = [t.requires_grad_() for t in (x, dt, A, B, C, D)]

    def loss(*args):
        y, last = ssd(*args, delay=16)
        return y.float().square().mean() + last.square().mean()

    compiled = torch.compile(loss, fullgraph=True)
    for one, other in zip(
        torch.autograd.grad(loss(*leaves), leaves), torch.autograd.grad(compiled(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is None, reason="the baseline's package is optional")
def test_mamba_ssm_equals_the_reference():
    # its fp32 products are tf32
    check((2, 2, 8), 300, 64, 64, "packed", 16, torch.float32, 5e-3, backend="mamba_ssm")
