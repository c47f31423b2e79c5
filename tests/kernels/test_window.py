import pytest
import torch
from mamba_hybrid_kernels import window_attention

from .naive import documents, naive_window


@pytest.mark.parametrize("window", [1, 3, 16, 20, 64])
@pytest.mark.parametrize("L", [1, 7, 64, 131])
@pytest.mark.parametrize("packed", [False, True])
def test_blocks_equal_full_scores(window, L, packed):
    torch.manual_seed(window + L)
    q, k, v = (torch.randn(2, L, n, w).double() for n, w in ((6, 8), (2, 8), (2, 5)))
    doc = documents(2, L) if packed else None
    out = window_attention(q, k, v, window, doc_BL=doc)
    torch.testing.assert_close(out, naive_window(q, k, v, window, doc), rtol=1e-9, atol=1e-9)


def test_gradients():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 20, n, 4).double().requires_grad_() for n in (4, 2, 2))
    assert torch.autograd.gradcheck(lambda *a: window_attention(*a, 3), (q, k, v))


def test_window_must_hold_the_token_itself():
    with pytest.raises(ValueError, match="window 0"):
        window_attention(*(torch.zeros(1, 1, 1, 1) for _ in range(3)), 0)
