import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mamba_hybrid.logprob import sequence_log_probs

SIZES = (9, 1, 14, 13)


def sample(D=12, V=29, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    M = sum(SIZES)
    hidden, head = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in ((M, D), (V, D)))
    labels = torch.randint(0, V, (M,), generator=g)
    return hidden.requires_grad_(), head.requires_grad_(), labels, torch.tensor(SIZES)


def naive(hidden, head, labels, sizes):
    """The definition with all logits at once; autograd does the rest."""
    token = (hidden @ head.T).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    return torch.stack([part.sum() for part in token.split(sizes.tolist())])


def mixed(log_probs):
    """A loss in which sequences meet, as in a preference loss."""
    a, b, c, d = log_probs
    return -F.logsigmoid(0.1 * ((a - b) - (c - d))) + 0.3 * a * d / 100


@pytest.mark.parametrize("chunk", [1, 7, 37, 100])
def test_sums_and_gradients_are_those_of_the_definition(chunk):
    args = sample()
    got, want = sequence_log_probs(*args, chunk_tokens=chunk), naive(*args)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(mixed(got), args[:2]), torch.autograd.grad(mixed(want), args[:2]), strict=True):
        torch.testing.assert_close(a, b)


def test_frozen_head_or_hidden_states_get_no_gradient_and_change_nothing():
    hidden, head, *rest = sample()
    both = torch.autograd.grad(mixed(sequence_log_probs(hidden, head, *rest)), (hidden, head))
    only = torch.autograd.grad(mixed(sequence_log_probs(hidden, head.detach(), *rest)), hidden)
    torch.testing.assert_close(only[0], both[0])
    only = torch.autograd.grad(mixed(sequence_log_probs(hidden.detach(), head, *rest)), head)
    torch.testing.assert_close(only[0], both[1])
    with torch.no_grad():
        assert not sequence_log_probs(hidden, head, *rest).requires_grad


def test_bf16_inputs_are_summed_in_fp32():
    args = sample(dtype=torch.bfloat16)
    got = sequence_log_probs(*args, chunk_tokens=16)
    assert got.dtype == torch.float32
    exact = [t.detach().double().requires_grad_() for t in args[:2]]
    want = naive(*exact, *args[2:])
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    for a, b in zip(torch.autograd.grad(mixed(got), args[:2]), torch.autograd.grad(mixed(want), exact), strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, rtol=2**-7, atol=2e-3)


class Watch(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that any operation returns, the backward pass included."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.largest = max(self.largest, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)), 0)
        return out


def test_never_more_logits_than_a_chunks():
    M, D, V, chunk = 400, 4, 300, 25
    hidden, head = torch.randn(M, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    labels, sizes = torch.randint(V, (M,)), torch.tensor([100, 300])
    largest = []
    for function in (naive, lambda *args: sequence_log_probs(*args, chunk_tokens=chunk)):
        with Watch() as watch:
            function(hidden, head, labels, sizes).sum().backward()
        largest.append(watch.largest)
    assert largest == [M * V, chunk * V]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_agrees_with_cpu(dtype):
    args = sample(D=64, V=1024, dtype=dtype)
    on_gpu = [t.detach().cuda() for t in args]
    for t in on_gpu[:2]:
        t.requires_grad_()
    here, there = sequence_log_probs(*args, chunk_tokens=10), sequence_log_probs(*on_gpu, chunk_tokens=10)
    torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-3)
    grads = (torch.autograd.grad(mixed(out), a[:2]) for out, a in ((here, args), (there, on_gpu)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=2e-2, atol=2e-2)


def test_an_fp32_head_is_cast_and_its_gradient_is_not():
    torch.manual_seed(0)
    hidden, master = torch.randn(9, 12).bfloat16().requires_grad_(), torch.randn(29, 12).requires_grad_()
    cast = master.detach().bfloat16().requires_grad_()
    labels, sizes = torch.arange(9), torch.tensor([4, 5])
    out, expected = (sequence_log_probs(hidden, w, labels, sizes, chunk_tokens=4) for w in (master, cast))
    assert torch.equal(out, expected)
    grads, others = (torch.autograd.grad(o.sum(), (hidden, w)) for o, w in ((out, master), (expected, cast)))
    assert torch.equal(grads[0], others[0])
    assert grads[1].dtype == torch.float32 and torch.equal(grads[1].bfloat16(), others[1])
    assert not torch.equal(grads[1], others[1].float())


def test_bad_arguments():
    hidden, head, labels, sizes = sample()
    for bad in ((hidden[:-1], head), (hidden[:, :-1], head), (hidden[0], head)):
        with pytest.raises(ValueError, match="hidden states"):
            sequence_log_probs(*bad, labels, sizes)
    with pytest.raises(ValueError, match="chunk_tokens 0"):
        sequence_log_probs(hidden, head, labels, sizes, chunk_tokens=0)
