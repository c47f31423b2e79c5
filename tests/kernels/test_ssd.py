import pytest
import torch
from mamba_hybrid_kernels import delay, ssd
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .naive import documents, naive_ssd

device = "cuda" if torch.cuda.is_available() else "cpu"
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
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
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


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("steps", [3, 40])
def test_delay_feeds_the_state_late(packed, started, steps):
    args = x, dt, A, B, C, D = inputs(2, 4, 8, 33)
    doc = documents(2, 33) if packed else None
    state = torch.randn(2, 4, 5, 7).double() if started else None
    y, last = ssd(*args, delay=steps, doc_BL=doc, state_BSPN=state, chunk=8)
    y_naive, last_naive = naive_ssd(delay(x, steps, doc), delay(dt, steps), A, delay(B, steps), C, D, doc, state)
    y_naive[:, :steps] = 0
    torch.testing.assert_close(y, y_naive, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(last, last_naive, rtol=1e-9, atol=1e-9)


def test_head_counts_are_checked():
    x, dt, A, B, C, D = inputs(2, 2, 8, 4)
    with pytest.raises(ValueError, match=r"3 state heads .* 2 key/value heads .* 8 query heads"):
        ssd(x, dt[:, :, :1].expand(-1, -1, 3), A[:1].expand(3), B, C, D)
    with pytest.raises(ValueError, match="nonsense"):
        ssd(x, dt, A, B, C, D, backend="nonsense")


def operator_inputs(packed, started, grad=True):
    """Arguments of torch.ops.mamba_hybrid.ssd."""
    tensors = [t.to(device).requires_grad_(grad) for t in inputs(1, 2, 4, 21, P=16, N=16, dtype=torch.float32, batch=1)]
    doc = documents(1, 21).to(device) if packed else None
    state = torch.randn(1, 2, 16, 16, device=device, requires_grad=grad) if started else None
    return (*tensors, doc, state, 3, 16)


def triton_ssd(x, dt, A, B, C, D, doc=None, state=None, steps=3, chunk=16):
    return ssd(x, dt, A, B, C, D, delay=steps, doc_BL=doc, state_BSPN=state, chunk=chunk, backend="triton")


@pytest.mark.triton
@pytest.mark.parametrize("packed,started", [(False, False), (True, True)])
def test_operator_is_sound(packed, started):
    torch.library.opcheck(torch.ops.mamba_hybrid.ssd.default, operator_inputs(packed, started))


@pytest.mark.triton
@pytest.mark.parametrize("packed,started", [(False, False), (True, True)])
def test_triton_equals_the_reference(packed, started):
    x, dt, A, B, C, D, doc, state, steps, chunk = operator_inputs(packed, started)
    leaves = [x, dt, A, B, C, D] + ([state] if started else [])
    y, last = triton_ssd(x, dt, A, B, C, D, doc, state, steps, chunk)
    grads = torch.autograd.grad(y.sin().sum() + last.sin().sum(), leaves)
    twins = [t.detach().double().requires_grad_() for t in leaves]
    y_ref, last_ref = ssd(
        *twins[:6], delay=steps, doc_BL=doc, state_BSPN=twins[6] if started else None, backend="reference"
    )
    wants = torch.autograd.grad(y_ref.sin().sum() + last_ref.sin().sum(), twins)
    for got, want in zip((y, last, *grads), (y_ref, last_ref, *wants), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.triton
def test_triton_takes_any_strides_and_one_output():
    x, dt, A, B, C, D, *_ = operator_inputs(False, False, grad=False)
    x, C = (t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (x, C))
    x.requires_grad_()
    y, last = triton_ssd(x, dt, A, B, C, D)
    y_ref, last_ref = ssd(x, dt, A, B, C, D, delay=3, backend="reference")
    torch.testing.assert_close(y, y_ref, rtol=1e-4, atol=1e-4)
    for got, want in ((y, y_ref), (last, last_ref)):
        got, want = (torch.autograd.grad(t.square().sum(), x, retain_graph=True)[0] for t in (got, want))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.triton
def test_triton_compiles_into_one_graph():
    args = operator_inputs(True, True)
    compiled = torch.compile(triton_ssd, fullgraph=True, backend="aot_eager")
    results = [run(*args) for run in (triton_ssd, compiled)]
    grads = [torch.autograd.grad(y.sum() + last.square().sum(), (*args[:6], args[7])) for y, last in results]
    for one, other in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.triton
def test_selective_checkpointing_can_keep_the_operators_outputs():
    ran = []

    def policy(ctx, op, *args, **kwargs):
        named = op == torch.ops.mamba_hybrid.ssd.default
        ran.append((named, ctx.is_recompute))
        return CheckpointPolicy.MUST_SAVE if named else CheckpointPolicy.PREFER_RECOMPUTE

    args = operator_inputs(False, False)
    plain = torch.autograd.grad(triton_ssd(*args)[0].square().sum(), args[:6])
    y, _ = checkpoint(
        triton_ssd, *args, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )
    kept = torch.autograd.grad(y.square().sum(), args[:6])
    assert (True, False) in ran
    for one, other in zip(plain, kept, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_autocast_leaves_the_decays_in_fp32(dtype):
    x, dt, A, B, C, D, *_ = operator_inputs(False, False)
    x, B, C = (t.detach().to(dtype).requires_grad_() for t in (x, B, C))
    with torch.autocast(device, dtype):
        y, last = triton_ssd(x, dt, A, B, C, D)
        grads = torch.autograd.grad(y.float().square().sum() + last.sum(), (x, dt, A, B, C, D))
    assert (y.dtype, last.dtype) == (dtype, torch.float32)
    assert [t.dtype for t in grads] == [t.dtype for t in (x, dt, A, B, C, D)]


@pytest.mark.triton
def test_triton_takes_no_fp64():
    with pytest.raises(ValueError, match="fp64"):
        triton_ssd(*inputs(1, 1, 1, 4))
