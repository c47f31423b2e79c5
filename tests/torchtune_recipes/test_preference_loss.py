import math

import pytest
import torch

from mamba_hybrid.errors import UserError
from torchtune_recipes.preference_loss import IPOLoss, SimPOLoss

LOGPS = torch.tensor(
    [[-3.0, -5.0, -2.0], [-4.0, -4.5, -9.0], [-3.5, -4.0, -2.5], [-4.0, -6.0, -8.0]], dtype=torch.float64
)


def test_ipo_is_equation_17():
    losses, chosen, rejected = IPOLoss(beta=0.2)(*LOGPS)
    for i, (c, r, rc, rr) in enumerate(LOGPS.T.tolist()):
        h = (c - r) - (rc - rr)  # log of pi(c) ref(r) / (pi(r) ref(c))
        assert float(losses[i]) == pytest.approx((h - 1 / (2 * 0.2)) ** 2)
        assert float(chosen[i] - rejected[i]) == pytest.approx(0.2 * h)


def test_ipo_is_least_at_a_finite_margin():
    zero = torch.zeros(1)
    at = {h: float(IPOLoss(beta=0.25)(torch.tensor([h]), zero, zero, zero)[0]) for h in (1.0, 2.0, 3.0, 100.0)}
    assert at[2.0] == 0 < at[1.0] == at[3.0] < at[100.0]


def test_simpo_is_equation_6():
    losses, chosen, rejected = SimPOLoss(beta=2.5, gamma=1.4)(*LOGPS[:2])
    for i, (c, r) in enumerate(LOGPS[:2].T.tolist()):
        assert float(losses[i]) == pytest.approx(-math.log(1 / (1 + math.exp(-(2.5 * c - 2.5 * r - 1.4)))))
        assert float(chosen[i]) == pytest.approx(2.5 * c) and float(rejected[i]) == pytest.approx(2.5 * r)
    assert SimPOLoss.length_normalised


@pytest.mark.parametrize("loss", [IPOLoss, SimPOLoss])
def test_rewards_have_no_gradient_and_the_loss_has(loss):
    chosen, rejected = (row.clone().requires_grad_() for row in LOGPS[:2])
    losses, *rewards = loss()(chosen, rejected, *(LOGPS[2:] if loss is IPOLoss else ()))
    assert not any(reward.requires_grad for reward in rewards)
    up, down = torch.autograd.grad(losses.sum(), (chosen, rejected))
    torch.testing.assert_close(up, -down)
    assert (up < 0).all()  # what is preferred becomes likelier


@pytest.mark.parametrize(
    ("loss", "arguments", "says"),
    [
        (IPOLoss, {"beta": 0.0}, "loss.beta 0.0 must be above 0"),
        (SimPOLoss, {"beta": -1.0}, "loss.beta -1.0 must be above 0"),
        (SimPOLoss, {"gamma": -0.5}, "loss.gamma -0.5 must be at least 0"),
    ],
)
def test_refused(loss, arguments, says):
    with pytest.raises(UserError, match=says):
        loss(**arguments)
