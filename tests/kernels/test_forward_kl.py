"""`forward_kl` against autograd in fp64: odd vocabularies, ignored tokens, temperatures, rows inside NaN."""

import pytest
import torch
from mamba_hybrid_kernels import forward_kl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.triton)]
SETTINGS = [(1.0, 0.0, 1.0), (0.7, 0.3, 1.0), (1.0, 0.5, 2.5), (0.0, 1.0, 0.5)]  # kl_weight, ce_weight, temperature


def inputs(K, V, spread=3.0):
    """Logits as columns of wider tensors whose rest is NaN, and labels of which some do not count."""
    torch.manual_seed(0)
    wide = torch.full((2, K, V + 5), float("nan"), device=DEVICE)
    wide[:, :, :V] = torch.randn(2, K, V, device=DEVICE) * spread
    labels = torch.randint(V, (K,), device=DEVICE)
    labels[::3] = -100
    return wide[0, :, :V], wide[1, :, :V], labels


def by_autograd(s, t, labels, a, b, tau):
    """kl, ce, agreement and slope, in fp64."""
    s, t, valid = s.double().requires_grad_(), t.double(), labels != -100
    log_p, log_r = (t / tau).log_softmax(-1), (s / tau).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_r)).sum(-1)[valid].sum()
    ce = torch.nn.functional.cross_entropy(s, labels, ignore_index=-100, reduction="sum")
    (a * tau**2 * kl + b * ce).backward()
    return kl, ce, int(((s.argmax(-1) == t.argmax(-1)) & valid).sum()), s.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("K,V", [(7, 11), (4, 2048), (5, 5003)])
def test_sums_and_slope(backend, setting, K, V):
    s, t, labels = inputs(K, V)
    kl, ce, agree, slope = by_autograd(s, t, labels, *setting)
    a, b, tau = setting
    out = forward_kl(
        s, t, labels, kl_weight=a, ce_weight=b, temperature=tau, slope=torch.float32, backend=backend
    )  # fmt: skip
    torch.testing.assert_close(out.kl.double(), kl, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.ce.double(), ce, rtol=1e-5, atol=1e-5)
    assert int(out.agree) == agree
    torch.testing.assert_close(out.slope.double(), slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_distributions_that_are_near_each_other(backend):
    _, t, labels = inputs(6, 3001)
    s = t + 1e-2 * torch.randn_like(t)
    kl = by_autograd(s, t, labels, 1.0, 0.0, 1.0)[0]
    out = forward_kl(
        s.clone(), t.clone(), labels, kl_weight=1, ce_weight=0, temperature=1, slope=None, backend=backend
    )  # fmt: skip
    assert out.slope is None
    torch.testing.assert_close(out.kl.double(), kl, rtol=0.05, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_large_logits_and_no_label(backend):
    s, t, labels = inputs(6, 2500, spread=200.0)
    s[1, [40, 2100]] = 3000.0  # the first of two best
    t[1, 40] = 3000.0
    kl, ce, agree, slope = by_autograd(s, t, labels, 1.0, 1.0, 1.0)
    settings = {"kl_weight": 1, "ce_weight": 1, "temperature": 1, "backend": backend}
    out = forward_kl(s.clone(), t.clone(), labels, slope=torch.bfloat16, **settings)
    torch.testing.assert_close(out.kl.double(), kl, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(out.ce.double(), ce, rtol=1e-5, atol=1e-4)
    assert int(out.agree) == agree
    torch.testing.assert_close(out.slope.double(), slope, rtol=1e-2, atol=1e-6)
    nothing = forward_kl(s.clone(), t.clone(), torch.full_like(labels, -100), slope=torch.float32, **settings)
    assert float(nothing.kl) == float(nothing.ce) == int(nothing.agree) == 0 and not nothing.slope.any()


@pytest.mark.triton
def test_refused():
    s, t, labels = inputs(3, 20)
    for bad in ((s.double(), t, labels), (s, t[:, :10], labels), (s.T, t.T, labels), (s, t, labels[:2])):
        with pytest.raises(ValueError, match="logits"):
            forward_kl(*bad, kl_weight=1, ce_weight=0, temperature=1, slope=None, backend="triton")
