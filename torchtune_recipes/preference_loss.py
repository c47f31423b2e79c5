"""Preference losses that torchtune lacks, with the interface of its DPOLoss.

Shapes: P pairs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mamba_hybrid.errors import UserError


class IPOLoss(nn.Module):
    """Identity preference optimisation: (h - 1 / (2 beta))^2, where h is by how much more than the reference the policy
    prefers the chosen answer, in nats. Unlike DPO's, its optimum is finite where a pair is always judged the same.

    Source: Azar et al., arXiv 2310.12036, equation 17 (their tau is beta), which takes whole answers'
    log-probabilities; `length_normalised: true` in the configuration gives the means over tokens that some use.

    Args:
        beta: weight of the reference, above 0.

    Raises:
        UserError: beta is not.
    """

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = _positive("beta", beta)

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses and rewards of pairs.

        Args:
            policy_chosen_logps, policy_rejected_logps: (P,) log-probabilities of the answers in nats.
            reference_chosen_logps, reference_rejected_logps: the reference's.

        Returns:
            losses, rewards of the chosen and of the rejected answers, each (P,); rewards have no gradient.
        """
        chosen_P = policy_chosen_logps - reference_chosen_logps
        rejected_P = policy_rejected_logps - reference_rejected_logps
        losses_P = (chosen_P - rejected_P - 1 / (2 * self.beta)) ** 2
        return losses_P, self.beta * chosen_P.detach(), self.beta * rejected_P.detach()


class SimPOLoss(nn.Module):
    """Simple preference optimisation: -log sigmoid(beta (c - r) - gamma), where c and r are the chosen and the
    rejected answer's log-probability per token. It needs no reference.

    Source: Meng et al., arXiv 2405.14734, equation 6.

    Args:
        beta: scale of the rewards, above 0.
        gamma: margin by which the chosen reward should exceed the rejected one, at least 0.

    Raises:
        UserError: they are not.
    """

    length_normalised = True

    def __init__(self, beta: float = 2.0, gamma: float = 1.0) -> None:
        super().__init__()
        self.beta = _positive("beta", beta)
        if not gamma >= 0:
            raise UserError(f"loss.gamma {gamma} must be at least 0")
        self.gamma = gamma

    def forward(self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Losses and rewards of pairs.

        Args:
            policy_chosen_logps, policy_rejected_logps: (P,) mean log-probabilities of the answers' tokens in nats.

        Returns:
            losses, rewards of the chosen and of the rejected answers, each (P,); rewards have no gradient.
        """
        chosen_P, rejected_P = self.beta * policy_chosen_logps, self.beta * policy_rejected_logps
        return -F.logsigmoid(chosen_P - rejected_P - self.gamma), chosen_P.detach(), rejected_P.detach()


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise UserError(f"loss.{name} {value} must be above 0")
    return value
