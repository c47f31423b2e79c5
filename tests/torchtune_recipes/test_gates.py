import pytest
import torch

from torchtune_recipes.gates import soft_top_k


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("temperature", [5.0, 1.0, 0.05])
def test_shares_sum_to_k_keep_the_order_and_the_gradient_is_the_values(k, temperature):
    logits = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(k), requires_grad=True)
    shares = soft_top_k(logits, k, temperature)
    assert float(shares.sum()) == pytest.approx(k, abs=1e-9)
    assert torch.equal(shares.argsort(), logits.argsort()) or temperature < 1  # near 0 and 1 they may be equal
    # a larger step than usual: the values come from a bisection
    assert torch.autograd.gradcheck(lambda x: soft_top_k(x, k, temperature), logits, eps=1e-4, atol=1e-5)


def test_cold_ones_are_the_top_k():
    shares = soft_top_k(torch.tensor([0.3, -1.0, 2.0, 0.5]), 2, 0.01)
    assert shares.tolist() == pytest.approx([0, 0, 1, 1], abs=1e-4)


def test_equal_logits_share_alike_and_numbers_far_apart_are_finite():
    assert soft_top_k(torch.zeros(8), 3, 1.0).tolist() == pytest.approx([3 / 8] * 8)
    logits = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    soft_top_k(logits, 1, 0.1).sum().backward()
    assert torch.isfinite(logits.grad).all()
