"""The kernels of SSD's gradients against autograd of the reference in fp64."""

import pytest
import torch
from mamba_hybrid_kernels import delay
from mamba_hybrid_kernels.ssd import ssd_reference

pytestmark = pytest.mark.triton

device = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "dt", "A", "B", "C", "D", "state")


def reference(x, dt, A, B, C, D, state, w, doc):
    """The recurrence on delayed inputs; the first w queries read nothing."""
    y, last = ssd_reference(delay(x, w, doc), delay(dt, w), A, delay(B, w), C, D, doc, state, 16)
    return torch.cat([torch.zeros_like(y[:, :w]), y[:, w:]], 1), last


def entering(x, dt, A, B, C, D, state, w, doc, chunk):
    """States entering each chunk: the last states of the rows before."""
    rows = max(x.shape[1] - w, 0)
    states = [state]
    for end in range(chunk, rows, chunk):
        before = None if doc is None else doc[:, :end]
        states.append(ssd_reference(x[:, :end], dt[:, :end], A, B[:, :end], C[:, :end], D, before, state, 16)[1])
    return torch.stack(states, 1)


def case(heads, L, P, N, w, packed, chunk, *, dtype=torch.float32, strided=False, batch=2, final=True):
    """Gradients of the kernels and of fp64's autograd, by name."""
    from mamba_hybrid_kernels.ssd_backward import ssd_backward

    torch.manual_seed(L + P + w)
    G, S, H = heads
    x, B, C = (torch.randn(batch, L, n, d).to(dtype) for n, d in ((G, P), (G, N), (H, N)))
    dt, A, D = torch.rand(batch, L, S), -torch.rand(S), torch.randn(H)
    doc = (torch.rand(batch, L) < 0.07).long().cumsum(1) if packed else None
    state = torch.randn(batch, S, P, N)
    dy, dlast = torch.randn(batch, L, H, P).to(dtype), torch.randn(batch, S, P, N) if final else None

    wanted = [t.double().requires_grad_() for t in (x, dt, A, B, C, D, state)]
    y, last = reference(*wanted, w, doc)
    loss = (y * dy.double()).sum() + (0 if dlast is None else (last * dlast.double()).sum())
    wants = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)

    with torch.no_grad():
        enter = entering(*(t.detach() for t in wanted), w, doc, chunk)
    enter = enter.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    dy[:, :w] = float("nan")  # what the first queries are told must not matter
    inputs = [x, dt, A, B, C, D]
    if strided:  # slices of wider projections
        inputs = [torch.stack([t, t.new_full(t.shape, float("nan"))], 1).unbind(1)[0] for t in inputs]
        dy = torch.cat([dy, dy], -1)[..., : dy.shape[-1]]
    inputs = [t.to(device) for t in inputs]
    doc = None if doc is None else doc.to(device)
    dlast = None if dlast is None else dlast.to(device)
    grads = ssd_backward(dy.to(device), dlast, *inputs, enter.to(device), delay=w, doc_BL=doc, chunk=chunk)
    dx, ddt, dA, dB, dC, dD, dstate = (t.cpu() for t in grads)
    assert [t.dtype for t in grads] == [t.dtype for t in (*inputs, state)]
    return dict(zip(NAMES, zip((dx, ddt, dA, dB, dC, dD, dstate), wants, strict=True), strict=True))


def check(grads, tolerance):
    for name, (got, want) in grads.items():
        assert got.isfinite().all(), name
        # A's is a sum over all tokens in which most cancels
        allowed = (5 if name == "A" else 1) * tolerance
        assert (got - want).norm() <= allowed * want.norm() + 1e-9, (name, (got - want).norm() / want.norm())


@pytest.mark.parametrize("heads", [(1, 1, 1), (2, 2, 6), (2, 4, 8), (1, 5, 5)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("w", [0, 5])
def test_gradients(heads, packed, w):
    check(case(heads, 75, 32, 32, w, packed, 32, batch=1), 5e-5)


@pytest.mark.parametrize("L,w,chunk", [(1, 0, 16), (16, 0, 16), (33, 16, 16), (40, 33, 64), (6, 6, 16), (4, 9, 16)])
@pytest.mark.parametrize("packed", [False, True])
def test_lengths(L, w, chunk, packed):
    check(case((1, 2, 4), L, 32, 32, w, packed, chunk), 5e-5)


@pytest.mark.parametrize("P,N", [(96, 64), (32, 96), (64, 128)])
def test_widths(P, N):
    check(case((1, 1, 2), 40, P, N, 3, True, 32, batch=1), 5e-5)


def test_strided_inputs_without_final_gradient():
    check(case((2, 2, 4), 40, 32, 32, 3, True, 32, strided=True, final=False), 5e-5)


BF16 = pytest.param(torch.bfloat16, 2e-2, marks=pytest.mark.gpu)  # the interpreter multiplies bf16 as integers


@pytest.mark.parametrize("dtype,tolerance", [BF16, (torch.float16, 3e-3)])
def test_low_precision(dtype, tolerance):
    check(case((2, 2, 4), 75, 32, 32, 5, True, 32, dtype=dtype), tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 5e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("heads", [(2, 2, 8), (2, 8, 8), (1, 1, 7)])
@pytest.mark.parametrize("P,N", [(128, 128), (64, 256), (256, 96)])
@pytest.mark.parametrize("packed", [False, True])
def test_wide_heads(dtype, tolerance, heads, P, N, packed):
    check(case(heads, 300, P, N, 20, packed, 128, dtype=dtype), tolerance)


def test_strong_decays():
    from mamba_hybrid_kernels.ssd_backward import entering_states, ssd_backward

    torch.manual_seed(0)
    x, B, C = (torch.randn(1, 40, n, 32, device=device) for n in (1, 1, 2))
    dt, A, D = 50 * torch.rand(1, 40, 1, device=device), torch.tensor([-20.0], device=device), C.new_zeros(2)
    dt[:, 10:20] = 0
    enter = entering_states(x, dt, A, B, chunk=32)
    grads = ssd_backward(torch.randn_like(C), None, x, dt, A, B, C, D, enter, chunk=32)
    assert all(t.isfinite().all() for t in grads)
