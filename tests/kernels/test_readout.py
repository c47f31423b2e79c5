import pytest
import torch
from mamba_hybrid_kernels import readout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [("sigmoid", "before_gate", True), ("sigmoid", "before_gate", False), ("silu", "after_gate", False)]
CASES += [("none", "before_gate", True), ("none", "after_gate", False), ("silu", "before_gate", True)]


def inputs(gate, near, M=5, H=3, P=24, dtype=torch.float32):
    """near, far, z and the weights; z is a slice of a wider tensor whose rest is NaN."""
    torch.manual_seed(0)
    near = torch.randn(M, H, P, device=DEVICE).to(dtype) if near else None
    far = torch.randn(M, H, P, device=DEVICE)
    wide = torch.full((M, H * P + 7), float("nan"), device=DEVICE, dtype=dtype)
    wide[:, 7:] = torch.randn(M, H * P, device=DEVICE)
    weights = torch.randn(2, H, P, device=DEVICE)
    return near, far, None if gate == "none" else wide[:, 7:], weights[0] if near is not None else None, weights[1]


def by_hand(near, far, z, near_weight, far_weight, gate, norm, eps):
    """Head by head, in fp64."""
    M, H, P = far.shape
    out = torch.empty(M, H, P, dtype=torch.float64)
    for m in range(M):
        for h in range(H):
            y, g = far[m, h].double().cpu(), 1.0
            if z is not None:
                v = z[m].view(H, P)[h].double().cpu()
                g = v * torch.sigmoid(v) if gate == "silu" else 2 * torch.sigmoid(v)
            if norm == "after_gate":
                y = y * g
            y = y / (y.pow(2).mean() + eps).sqrt() * far_weight[h].double().cpu()
            if near is not None:
                y = y + near[m, h].double().cpu() * near_weight[h].double().cpu()
            out[m, h] = y if norm == "after_gate" else y * g
    return out.flatten(1)


@pytest.mark.parametrize("gate,norm,near", CASES)
@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.triton)])
def test_equals_heads_one_by_one(gate, norm, near, backend):
    args = inputs(gate, near)
    got = readout(*args, gate=gate, norm=norm, eps=1e-3, backend=backend)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double().cpu(), by_hand(*args, gate, norm, 1e-3), rtol=1e-5, atol=1e-5)


@pytest.mark.triton
@pytest.mark.parametrize("H,P", [(1, 16), (32, 128), (5, 96)])
def test_triton_in_16_bits_with_many_heads(H, P):
    args = inputs("sigmoid", True, 2, H, P, torch.float16)
    got, want = (readout(*args, backend=backend) for backend in ("triton", "reference"))
    assert got.dtype == torch.float16
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)
    near, far, z, *weights = args
    assert readout(near[:0], far[:0], z[:0], *weights, backend="triton").shape == (0, H * P)


def test_gate_and_backend_are_checked():
    near, far, z, near_weight, far_weight = inputs("sigmoid", True)
    with pytest.raises(ValueError, match="gate 'none'"):
        readout(near, far, z, near_weight, far_weight, gate="none")
    with pytest.raises(ValueError, match="nonsense"):
        readout(near, far, z, near_weight, far_weight, backend="nonsense")
