"""The SSD forward kernels against naive token loops in fp64: documents, delays, initial states, odd shapes, strided
inputs, extreme decays. In Triton's interpreter on a CPU."""

import random

import pytest
import torch
from mamba_hybrid_kernels import delay

from .naive import documents, naive_ssd

pytestmark = pytest.mark.triton
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS = [(1, 1, 1), (2, 2, 4), (1, 3, 3), (1, 1, 5), (2, 2, 12), (1, 7, 7), (1, 2, 8), (2, 6, 12)]  # G, S, H
WIDTHS = [(32, 32), (64, 32), (96, 96), (32, 128), (256, 32), (32, 256)]  # P, N


def inputs(batch, length, G, S, H, P, N, dtype=torch.float32):
    """x, dt, A, B, C, D; x, B and C as views into one tensor with NaN after each row, dt (B, S, L) transposed."""
    width = G * P + G * N + H * N
    rows = torch.randn(batch, length, width + 16)
    rows[..., width:] = float("nan")
    rows = rows.to(DEVICE, dtype)
    x, B, C = rows[..., :width].split([G * P, G * N, H * N], -1)
    dt = torch.rand(batch, S, length, device=DEVICE).transpose(1, 2)
    A, D = -torch.rand(S, device=DEVICE) * 0.3, torch.randn(H, device=DEVICE)
    return x.unflatten(-1, (G, P)), dt, A, B.unflatten(-1, (G, N)), C.unflatten(-1, (H, N)), D


def want(x, dt, A, B, C, D, w, doc=None, state=None, chunk=128):
    """y, final and entering states by the token loop, in fp64 on the CPU."""
    x, dt, A, B, C, D = (t.double().cpu() for t in (x, dt, A, B, C, D))
    state = None if state is None else state.double().cpu()
    L = x.shape[1]
    doc = None if doc is None else doc.cpu()
    y = naive_ssd(delay(x, w, doc), delay(dt, w), A, delay(B, w), C, D, doc, state)[0]
    y[:, :w] = 0

    def state_after(rows):  # of the document of row `rows` - 1, or of token 0
        if rows <= 0:
            zeros = torch.zeros(len(x), dt.shape[2], x.shape[3], B.shape[3], dtype=torch.float64)
            return zeros if state is None else state
        part = [t[:, :rows] for t in (x, dt, B, C)]
        return naive_ssd(*part[:2], A, *part[2:], D, None if doc is None else doc[:, :rows], state)[1]

    final = state_after(L - w)
    if doc is not None:
        final = torch.where((doc[:, max(L - w - 1, 0)] == doc[:, -1])[:, None, None, None], final, 0)
    enter = [state_after(i) for i in range(0, max(L - w, 1), chunk)]
    return y, final, torch.stack(enter, 1)


def compare(got, expected, tolerance):
    for name, g, e in zip(("y", "final", "enter"), got, expected, strict=True):
        scale = max(float(e.abs().max()), 1.0)
        torch.testing.assert_close(g.double().cpu(), e, rtol=tolerance, atol=tolerance * scale, msg=lambda m: name + m)  # noqa: B023


def check(seed, most=110, dtype=torch.float32, tolerance=2e-5, **shape):
    from mamba_hybrid_kernels.ssd_forward import OutputsLaunch, StatesLaunch, ssd_forward

    rng = random.Random(seed)
    torch.manual_seed(seed)
    (G, S, H), (P, N) = rng.choice(HEADS), rng.choice(WIDTHS)
    batch, length, chunk = rng.choice([1, 2]), rng.randint(1, most), rng.choice([16, 32, 64])
    w = rng.choice([0, 0, 1, 5, 40])
    args = inputs(batch, length, G, S, H, P, N, dtype)
    doc = documents(batch, length).to(DEVICE) * 3 - 2 if rng.random() < 0.5 else None
    state = torch.randn(batch, S, P, N, device=DEVICE) if rng.random() < 0.5 else None
    got = ssd_forward(
        *args, delay=w, doc_BL=doc, state_BSPN=state, chunk=chunk,
        launch=OutputsLaunch(
            block_p=rng.choice([32, 64]), block_j=rng.choice([16, 32, 64]), heads=rng.choice([1, 2, 4]), stages=1
        ),
        walk=StatesLaunch(block_p=rng.choice([16, 64]), block_n=rng.choice([32, 64]), block_j=rng.choice([16, 64])),
    )  # fmt: skip
    compare(got, want(*args, w, doc, state, chunk), tolerance)


@pytest.mark.parametrize("seed", range(16))
def test_against_token_loop(seed):
    check(seed)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(100, 120))
def test_long_against_token_loop(seed, dtype):
    check(seed, 600, dtype, {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype])


@pytest.mark.gpu  # the interpreter multiplies bf16 as integers
@pytest.mark.parametrize("w", [0, 7])
def test_defaults_and_bf16(w):
    from mamba_hybrid_kernels.ssd_forward import ssd_forward

    torch.manual_seed(0)
    args = inputs(1, 140, 1, 1, 2, 32, 32, torch.bfloat16)
    y, final, enter = ssd_forward(*args, delay=w)
    assert (y.dtype, final.dtype, enter.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    expected = want(*args, w)
    compare((y, final, enter), expected, 1e-2)
    # the carried state does not see bf16's rounding of exp(..) dt x
    compare((y, final, enter), (y.double().cpu(), expected[1], enter.double().cpu()), 2e-5)
    kept = ssd_forward(*args, delay=w, enter_dtype=torch.float32)
    compare(kept, (expected[0], *expected[1:]), 1e-2)
    compare(kept, (kept[0].double().cpu(), *expected[1:]), 2e-5)


@pytest.mark.parametrize(("length", "w"), [(1, 0), (3, 3), (3, 8), (17, 16), (33, 1)])
def test_short(length, w):
    from mamba_hybrid_kernels.ssd_forward import ssd_forward

    torch.manual_seed(length)
    args = inputs(2, length, 1, 1, 2, 32, 32)
    doc = documents(2, length).to(DEVICE)
    for d in (None, doc):
        for state in (None, torch.randn(2, 1, 32, 32, device=DEVICE)):
            got = ssd_forward(*args, delay=w, doc_BL=d, state_BSPN=state, chunk=16)
            compare(got, want(*args, w, d, state, 16), 2e-5)


@pytest.mark.parametrize("rate", [0.0, 80.0, 1e4])
def test_extreme_decays(rate):
    """Decays down to exp(-1e4) a chunk and below, rows with dt = 0."""
    from mamba_hybrid_kernels.ssd_forward import ssd_forward

    torch.manual_seed(1)
    x, dt, A, B, C, D = inputs(1, 140, 1, 2, 2, 32, 32)
    dt = torch.where(torch.rand_like(dt) < 0.2, 0, dt)
    A = torch.full_like(A, -rate)
    got = ssd_forward(x, dt, A, B, C, D, chunk=64)
    compare(got, want(x, dt, A, B, C, D, 0, chunk=64), 1e-3 if rate > 100 else 5e-5)


def test_refusals():
    from mamba_hybrid_kernels.ssd_forward import ssd_forward

    x, dt, A, B, C, D = inputs(1, 5, 2, 2, 4, 32, 32)
    with pytest.raises(ValueError, match="chunk 48"):
        ssd_forward(x, dt, A, B, C, D, chunk=48)
    with pytest.raises(ValueError, match="multiple of 2"):
        ssd_forward(x, dt[..., :1], A[:1], B, C, D)
    with pytest.raises(ValueError, match="C of strides"):
        ssd_forward(x, dt, A, B, C.transpose(2, 3).contiguous().transpose(2, 3), D)
    with pytest.raises(ValueError, match="B is"):
        ssd_forward(x, dt, A, B.double(), C, D)
