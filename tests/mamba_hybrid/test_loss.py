import pytest
import torch
import torch.nn.functional as F

from mamba_hybrid.loss import distillation_loss


def sample(M=37, D=12, E=20, V=29, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    student, head, teacher, teacher_head = (
        torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in ((M, D), (V, D), (M, E), (V, E))
    )
    labels = torch.randint(0, V, (M,), generator=g)
    labels[torch.rand(M, generator=g) < 0.4] = -100
    return student.requires_grad_(), head.requires_grad_(), teacher, teacher_head, labels


def naive(student, head, teacher, teacher_head, labels, a, b, tau):
    """The formula with all logits at once; autograd does the rest."""
    s, t, counted = student @ head.T, teacher @ teacher_head.T, labels != -100
    p, q = (t / tau).log_softmax(-1), (s / tau).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)[counted].sum()
    ce = F.cross_entropy(s, labels, ignore_index=-100, reduction="sum")
    agree = (s.argmax(-1) == t.argmax(-1))[counted].sum()
    return a * tau**2 * kl + b * ce, kl, ce, agree, counted.sum()


@pytest.mark.parametrize("chunk", [1, 7, 37, 100])
@pytest.mark.parametrize(("a", "b", "tau"), [(1.0, 0.0, 1.0), (0.7, 0.3, 1.0), (0.5, 0.5, 2.0), (0.0, 1.0, 1.0)])
def test_sums_and_gradients_are_those_of_the_formula(chunk, a, b, tau):
    args = sample()
    out = distillation_loss(*args, kl_weight=a, ce_weight=b, temperature=tau, chunk_tokens=chunk)
    grads = torch.autograd.grad(out.loss * 0.37, args[:2])
    expected = naive(*args, a, b, tau)
    for got, want in zip(out, expected, strict=True):
        torch.testing.assert_close(got, want, check_dtype=False)
    for got, want in zip(grads, torch.autograd.grad(expected[0] * 0.37, args[:2]), strict=True):
        torch.testing.assert_close(got, want)


def plain_divergence(kind, p, r, skew=0.1, beta=0.5):
    """Term by term from the definitions, of distributions."""

    def kl(a, b):
        return (a * (a.log() - b.log())).sum(-1)

    if kind == "reverse":
        return kl(r, p)
    if kind == "skewed":
        return kl(p, skew * p + (1 - skew) * r)
    m = beta * p + (1 - beta) * r
    return beta * kl(p, m) + (1 - beta) * kl(r, m)


@pytest.mark.parametrize("more", [{}, {"skew": 0.3, "beta": 0.2}])
@pytest.mark.parametrize(("a", "b", "tau", "chunk"), [(1.0, 0.0, 1.0, 7), (0.7, 0.3, 1.0, 100), (0.5, 0.5, 2.0, 10)])
@pytest.mark.parametrize("kind", ["reverse", "skewed", "js"])
def test_other_divergences_have_the_value_and_gradients_of_autograd(kind, a, b, tau, chunk, more):
    args = sample()
    student, head, teacher, teacher_head, labels = args
    out = distillation_loss(
        *args, kl_weight=a, ce_weight=b, temperature=tau, chunk_tokens=chunk, divergence=kind, **more
    )
    grads = torch.autograd.grad(out.loss * 0.37, args[:2])
    _, kl, ce, *counts = naive(*args, a, b, tau)
    p, r = ((h @ w.T / tau).softmax(-1) for h, w in ((teacher, teacher_head), (student, head)))
    loss = a * tau**2 * plain_divergence(kind, p, r, **more)[labels != -100].sum() + b * ce
    for got, want in zip(out, (loss, kl, ce, *counts), strict=True):
        torch.testing.assert_close(got, want, check_dtype=False)
    for got, want in zip(grads, torch.autograd.grad(loss * 0.37, args[:2]), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", ["forward", "reverse", "skewed", "js"])
def test_probabilities_that_vanish_leave_a_finite_loss_and_gradient(kind):
    student, head, teacher, teacher_head, labels = (t.float() if t.is_floating_point() else t for t in sample())
    # apart by hundreds of nats: most probabilities are 0 in fp32
    student = (student * 100).detach().requires_grad_()
    out = distillation_loss(student, head, teacher * 100, teacher_head, labels, divergence=kind)
    (grad,) = torch.autograd.grad(out.loss, student)
    assert torch.isfinite(out.loss) and torch.isfinite(grad).all() and out.loss > 0
    bound = {"skewed": -torch.log(torch.tensor(0.1)), "js": torch.log(torch.tensor(2.0))}.get(kind, torch.inf)
    assert out.loss / out.tokens <= bound * (1 + 1e-5)


def test_kl_of_a_model_with_itself_is_zero():
    student, head, *_, labels = sample()
    out = distillation_loss(student, head, student.detach(), head.detach(), labels)
    assert abs(out.kl) < 1e-12 and out.agree == out.tokens
    assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(out.loss, (student, head)))


def test_no_token_counts():
    student, head, teacher, teacher_head, labels = sample()
    out = distillation_loss(student, head, teacher, teacher_head, torch.full_like(labels, -100), ce_weight=1.0)
    assert [float(v) for v in out] == [0] * 5
    assert all(not g.any() for g in torch.autograd.grad(out.loss, (student, head)))


def test_tied_weight_gets_both_gradients():
    _, head, teacher, teacher_head, labels = sample()
    ids = torch.arange(37) % 29

    def grad(loss_of):
        return torch.autograd.grad(loss_of(F.embedding(ids, head)), head)[0]

    torch.testing.assert_close(
        grad(lambda h: distillation_loss(h, head, teacher, teacher_head, labels, chunk_tokens=5).loss),
        grad(lambda h: naive(h, head, teacher, teacher_head, labels, 1, 0, 1)[0]),
    )


def test_frozen_head_or_hidden_states_get_no_gradient_and_change_nothing():
    student, head, *rest = sample()
    both = torch.autograd.grad(distillation_loss(student, head, *rest).loss, (student, head))
    only = torch.autograd.grad(distillation_loss(student, head.detach(), *rest).loss, student)
    torch.testing.assert_close(only[0], both[0])
    only = torch.autograd.grad(distillation_loss(student.detach(), head, *rest).loss, head)
    torch.testing.assert_close(only[0], both[1])
    with torch.no_grad():
        assert not distillation_loss(student, head, *rest).loss.requires_grad


def test_bf16_inputs_are_summed_in_fp32():
    args = sample(M=500, dtype=torch.bfloat16)
    out = distillation_loss(*args, ce_weight=0.5, chunk_tokens=16)
    assert out.loss.dtype == torch.float32
    exact = [t.detach().double() if t.is_floating_point() else t for t in args]
    for t in exact[:2]:
        t.requires_grad_()
    expected = naive(*exact, 1.0, 0.5, 1.0)
    torch.testing.assert_close(out.loss.double(), expected[0], rtol=1e-5, atol=0)
    for got, want in zip(
        torch.autograd.grad(out.loss, args[:2]), torch.autograd.grad(expected[0], exact[:2]), strict=True
    ):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), want, rtol=2**-7, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_agrees_with_cpu(dtype):
    args = sample(M=512, D=64, E=128, V=1024, dtype=dtype)
    on_gpu = [t.detach().cuda() for t in args]
    for t in on_gpu[:2]:
        t.requires_grad_()
    here, there = distillation_loss(*args, chunk_tokens=100), distillation_loss(*on_gpu, chunk_tokens=100)
    torch.testing.assert_close(there.kl.cpu(), here.kl, rtol=1e-4, atol=1e-3)
    for a, b in zip(torch.autograd.grad(there.loss, on_gpu[:2]), torch.autograd.grad(here.loss, args[:2]), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", ["forward", "js"])
def test_an_fp32_head_is_cast_and_its_gradient_is_not(kind):
    student, head, *rest = (t.bfloat16() if t.is_floating_point() else t for t in sample(dtype=torch.float32))
    student, master = student.detach().requires_grad_(), torch.randn(head.shape).requires_grad_()
    cast = master.detach().bfloat16().requires_grad_()
    out, expected = (distillation_loss(student, w, *rest, divergence=kind, chunk_tokens=7) for w in (master, cast))
    assert torch.equal(out.loss, expected.loss)
    grads, others = (torch.autograd.grad(o.loss * 0.37, (student, w)) for o, w in ((out, master), (expected, cast)))
    assert torch.equal(grads[0], others[0])
    assert grads[1].dtype == torch.float32 and torch.equal(grads[1].bfloat16(), others[1])
    assert not torch.equal(grads[1], others[1].float())


def test_bad_arguments():
    student, head, teacher, teacher_head, labels = sample()
    with pytest.raises(ValueError, match="36 student"):
        distillation_loss(student[:-1], head, teacher, teacher_head, labels)
    with pytest.raises(ValueError, match="vocabularies of 29 and 28"):
        distillation_loss(student, head, teacher, teacher_head[:-1], labels)
    for bad in (dict(chunk_tokens=0), dict(temperature=0.0)):
        with pytest.raises(ValueError, match="must be positive"):
            distillation_loss(student, head, teacher, teacher_head, labels, **bad)
    for bad, says in (
        (dict(divergence="kl"), "divergence 'kl' is none of forward, reverse, skewed, js"),
        (dict(divergence="skewed", skew=1.0), "skew 1.0 must be between 0 and 1"),
        (dict(divergence="js", beta=0.0), "beta 0.0 must be between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=says):
            distillation_loss(student, head, teacher, teacher_head, labels, **bad)
