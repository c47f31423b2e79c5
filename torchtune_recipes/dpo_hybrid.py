"""DPO distillation: the student learns from pairs of answers which one is preferred, measured against the teacher.

Shapes: B rows, L tokens of a row, P pairs of a batch, M tokens of their answers, D model width.
"""

from __future__ import annotations

import inspect
import math

import torch
from mamba_hybrid_kernels import PackedDocuments
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mamba_hybrid.errors import UserError
from mamba_hybrid.flops import preference_flops
from mamba_hybrid.logprob import sequence_log_probs
from mamba_hybrid.model import HybridMambaForCausalLM

from .models import Wrapped, shard
from .preference import PairBatch, PairRows
from .recipe import FIXED, OPTIONAL, REQUIRED, HybridRecipe, command, component
from .recipe import run as run_recipe

REFERENCES = ("teacher", "student")
POLICY_ONLY = ("policy_chosen_logps", "policy_rejected_logps")
WITH_REFERENCE = (*POLICY_ONLY, "reference_chosen_logps", "reference_rejected_logps")


class Scorer(Wrapped):
    """A model that gives answers' log-probabilities, made inside its forward: there FSDP has gathered the head.

    Args:
        model: in the mode, training or evaluation, that it is to run in.
    """

    def __init__(self, model: HybridMambaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        tokens_BL: Tensor,
        documents: Tensor | PackedDocuments,
        positions_M: Tensor,
        labels_M: Tensor,
        sizes_P2: Tensor,
        chunk: int,
    ) -> Tensor:
        """(2 P,) fp32, of each pair's chosen and rejected answer in nats; the arguments are `PairBatch`'s and how many
        tokens' logits exist at a time."""
        h_BLD = self.model.model(tokens_BL, document_ids=documents).last_hidden_state
        h_MD = h_BLD.flatten(0, 1).index_select(0, positions_M)
        return sequence_log_probs(h_MD, self.head, labels_M, sizes_P2.flatten(), chunk_tokens=chunk)


class DpoHybrid(HybridRecipe):
    """Preference learning after KD-SFT.

    The loss of a pair is the configured one of the answers' log-probabilities, plus `sft_weight` times the chosen
    answer's negative log-likelihood per token. The reference is the teacher, as section 3 of arXiv 2408.15237 has it,
    or the student as it was at the start (`reference: student`); a loss that takes none has none loaded.

    Raises:
        UserError: as HybridRecipe, and for a loss that is not of that kind.
    """

    takes = (PairRows,)
    makers = ("preference.preference_dataset",)
    doing = "preferring"
    required = (*(key for key in REQUIRED if key != "teacher"), "rest_lr", "loss")
    optional = (
        *OPTIONAL, "teacher", "reference", "sft_weight", "length_normalised", "chunk_tokens", "freeze",
        "enable_activation_checkpointing",
    )  # fmt: skip
    fixed = (*FIXED, "rest_lr", "loss", "reference", "sft_weight", "length_normalised", "freeze")
    measured = (
        "loss", "reward_margin", "accuracy", "chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp",
        "chosen_nll",
    )  # fmt: skip
    counts = "pairs"

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        reference = cfg.get("reference", "teacher")
        if reference not in REFERENCES:
            raise UserError(f"reference {reference!r} is none of {', '.join(REFERENCES)}")
        self.sft_weight = cfg.get("sft_weight") or 0.0
        if not isinstance(self.sft_weight, (int, float)) or not 0 <= self.sft_weight < math.inf:
            raise UserError(f"sft_weight {self.sft_weight!r} must be a number of at least 0")
        self.chunk_tokens = cfg.get("chunk_tokens", 512)
        if not isinstance(self.chunk_tokens, int) or self.chunk_tokens < 1:
            raise UserError(f"chunk_tokens {self.chunk_tokens!r} must be a whole number above 0")
        self.preference_loss, takes_reference = preference_loss(cfg.loss)
        normalised = cfg.get("length_normalised")
        if normalised not in (None, True, False):
            raise UserError(f"length_normalised {normalised!r} must be true, false or null for the loss's own")
        self.length_normalised: bool = (
            getattr(self.preference_loss, "length_normalised", False) if normalised is None else normalised
        )
        self.teacher_path = None
        if takes_reference:
            self.teacher_path = cfg.student if reference == "student" else cfg.get("teacher")
            if self.teacher_path is None:
                raise UserError("the config lacks teacher, the reference; reference=student needs none")

    def build(self, student: HybridMambaForCausalLM, teacher: HybridMambaForCausalLM, mesh: DeviceMesh) -> None:
        assert isinstance(self.data, PairRows)
        if self.data.dropped and self.rank == 0:
            print(
                f"left out {self.data.dropped} of {self.data.dropped + self.data.valid_R.sum()} pairs, longer than "
                f"dataset.max_seq_len {self.data.length}", flush=True,
            )  # fmt: skip
        compute = bool(self.cfg.get("compile"))
        self.student = Scorer(student.train())
        shard(
            self.student, mesh, self.dtype,
            masters=True,
            compute_layers=compute,
            checkpoint_activations=int(bool(self.cfg.get("enable_activation_checkpointing"))),
        )  # fmt: skip
        if self.teacher_path is not None:
            self.teacher = Scorer(teacher.requires_grad_(False).eval())
            shard(self.teacher, mesh, self.dtype, compute_layers=compute, offload=self.offload)

    def log_probs(self, model: Wrapped, batch: PairBatch) -> Tensor:
        """(P, 2) of the chosen and rejected answers, in nats."""
        return model(*batch, self.chunk_tokens).view(-1, 2)

    def flops(self) -> float:
        frozen, reference = self.frozen(), None if self.teacher_path is None else self.teacher.model.config
        return preference_flops(
            self.student.model.config, reference, self.data.length, lambda part: part not in frozen,
            headed=float(self.data.counted_RL.mean()),
        )  # fmt: skip

    def learn(self, batch: PairBatch, counted: int) -> Tensor:
        scale_P2 = batch.sizes if self.length_normalised else torch.ones_like(batch.sizes)
        scores: list[Tensor] = []
        if self.teacher_path is not None:  # before the student's, whose activations would be held meanwhile
            with torch.no_grad():
                theirs_P2 = self.side(lambda: self.log_probs(self.teacher, batch))
                scores.extend((theirs_P2 / scale_P2).unbind(1))
        logp_P2 = self.log_probs(self.student, batch)
        losses_P, chosen_P, rejected_P = self.preference_loss(*(logp_P2 / scale_P2).unbind(1), *scores)
        nll_P = -logp_P2[:, 0] / batch.sizes[:, 0]
        losses_P = losses_P + self.sft_weight * nll_P
        (losses_P.sum() / counted).backward()
        margin_P = chosen_P - rejected_P
        measured = [losses_P, margin_P, margin_P > 0, chosen_P, rejected_P, *logp_P2.unbind(1), nll_P]
        return torch.stack([v.detach().float().sum() for v in measured])


def preference_loss(node: DictConfig) -> tuple[nn.Module, bool]:
    """The loss of the configuration, and whether it takes a reference.

    Args:
        node: with a `_component_` like torchtune.rlhf.loss.DPOLoss: called with (P,) log-probabilities of the policy's
            chosen and rejected answers and, unless it needs none, of the reference's, it returns losses, chosen and
            rejected rewards, each (P,).

    Raises:
        UserError: it takes or returns something else.
    """
    beta = node.get("beta", 1) if isinstance(node, DictConfig) else 1
    if not isinstance(beta, (int, float)) or not 0 < beta < math.inf:
        raise UserError(f"loss.beta {beta!r} must be a number above 0")
    loss = component("loss", node)
    name = node._component_
    takes = tuple(inspect.signature(loss.forward).parameters) if isinstance(loss, nn.Module) else ()
    if takes not in (POLICY_ONLY, WITH_REFERENCE):
        raise UserError(
            f"loss: {name} takes {', '.join(takes) or 'nothing'}; it must take {', '.join(POLICY_ONLY)}, and may take "
            f"{', '.join(WITH_REFERENCE[2:])} behind them"
        )
    made = loss(*torch.zeros(len(takes), 3))
    if not isinstance(made, tuple) or [getattr(v, "shape", None) for v in made] != [(3,)] * 3:
        raise UserError(f"loss: {name} must return losses, chosen and rejected rewards, a number for each pair")
    return loss, takes == WITH_REFERENCE


@command
def main(cfg: DictConfig) -> int:
    """Teach a hybrid preferences: tune run [--nproc_per_node N] dpo_hybrid --config FILE [key=value ...]"""
    return run(cfg)


def run(cfg: DictConfig) -> int:
    """The recipe; see `recipe.run`."""
    return run_recipe(DpoHybrid, cfg)
