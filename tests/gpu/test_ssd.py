"""mamba-ssm's Triton scan behind `ssd` against the reference in fp64, gradients included."""

import pytest
import torch
from mamba_hybrid_kernels import ssd

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("heads", [(2, 2, 8), (3, 9, 9), (2, 4, 8)])
@pytest.mark.parametrize("L", [64, 300])
@pytest.mark.parametrize("kind", ["plain", "packed", "started"])
def test_triton_scan_equals_the_reference(heads, L, kind):
    torch.manual_seed(L)
    G, S, H = heads
    x, B, C = (torch.randn(2, L, n, 64, device="cuda") for n in (G, G, H))
    dt, A, D = torch.rand(2, L, S, device="cuda"), -torch.rand(S, device="cuda") * 0.2, torch.randn(H, device="cuda")
    doc = (torch.rand(2, L, device="cuda") < 0.02).long().cumsum(1) if kind == "packed" else None
    state = torch.randn(2, S, 64, 64, device="cuda") if kind == "started" else None
    ours = [t.clone().requires_grad_() for t in (x, dt, A, B, C, D)]
    reference = [t.double().requires_grad_() for t in (x, dt, A, B, C, D)]
    y, last = ssd(*ours, doc_BL=doc, state_BSPN=state)
    y_ref, last_ref = ssd(
        *reference, doc_BL=doc, state_BSPN=None if state is None else state.double(), backend="reference"
    )
    grad = torch.randn_like(y)
    (y * grad).sum().backward()
    (y_ref * grad).sum().backward()
    pairs = [(y, y_ref), (last, last_ref), *((a.grad, b.grad) for a, b in zip(ours, reference, strict=True))]
    for got, want in pairs:
        # Triton's fp32 products are tf32
        assert (got - want).norm() / want.norm() < 5e-3
