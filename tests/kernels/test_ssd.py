import pytest
import torch
from mamba_hybrid_kernels import delay, ssd

from .naive import documents, naive_ssd

HEADS = [(1, 1, 1), (2, 2, 8), (2, 4, 8), (3, 9, 9), (3, 3, 9)]


def inputs(G, S, H, L, P=5, N=7, dtype=torch.float64, batch=2):
    torch.manual_seed(L + H)
    x, B, C = (torch.randn(batch, L, n, w, dtype=dtype) for n, w in ((G, P), (G, N), (H, N)))
    dt, A, D = torch.rand(batch, L, S, dtype=dtype), -torch.rand(S, dtype=dtype), torch.randn(H, dtype=dtype)
    return x, dt, A, B, C, D


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("L", [1, 5, 64, 131])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("started", [False, True])
def test_chunked_equals_token_loop(heads, L, packed, started):
    args = inputs(*heads, L)
    doc = documents(2, L) if packed else None
    state = torch.randn(2, heads[1], 5, 7).double() if started else None
    y, last = ssd(*args, doc_BL=doc, state_BSPN=state, chunk=16)
    y_naive, last_naive = naive_ssd(*args, doc, state)
    torch.testing.assert_close(y, y_naive, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(last, last_naive, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_low_precision_inputs(dtype, tolerance):
    x, dt, A, B, C, D = inputs(2, 4, 8, 200, dtype=torch.float32)
    x, B, C = (t.to(dtype) for t in (x, B, C))
    y, state = ssd(x, dt, A, B, C, D)
    y_naive, state_naive = naive_ssd(*(t.double() for t in (x, dt, A, B, C, D)))
    assert y.dtype == state.dtype == torch.float32
    assert (y - y_naive).norm() / y_naive.norm() < tolerance
    assert (state - state_naive).norm() / state_naive.norm() < tolerance


def test_gradients():
    torch.manual_seed(0)
    x, dt, A, B, C, D = (t.requires_grad_() for t in inputs(1, 2, 4, 9, P=3, N=2, batch=1))
    doc = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    state = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)

    def run(*args):
        return ssd(*args[:6], doc_BL=doc, state_BSPN=args[6], chunk=4)

    assert torch.autograd.gradcheck(run, (x, dt, A, B, C, D, state))


def test_long_decay_stays_finite():
    x, dt, A, B, C, D = inputs(1, 1, 1, 300, dtype=torch.float32)
    y, state = ssd(x, dt * 50, A * 100, B, C, D)
    assert y.isfinite().all() and state.isfinite().all()


def test_delay_keeps_documents_apart():
    doc = torch.tensor([[0, 0, 0, 1, 1, 1]])
    t = torch.arange(1.0, 7.0)[None]
    assert delay(t, 2, doc).tolist() == [[0, 0, 1, 0, 0, 4]]
    assert delay(t, 9).tolist() == [[0] * 6]


def test_head_counts_are_checked():
    x, dt, A, B, C, D = inputs(2, 2, 8, 4)
    with pytest.raises(ValueError, match=r"3 state heads .* 2 key/value heads .* 8 query heads"):
        ssd(x, dt[:, :, :1].expand(-1, -1, 3), A[:1].expand(3), B, C, D)
    with pytest.raises(ValueError, match="nonsense"):
        ssd(x, dt, A, B, C, D, backend="nonsense")
