"""A model in which every layer holds attention and mixer, and gates between them.

Shapes: B rows, L tokens, D model width, V vocabulary, I layers, A answers of a row.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mamba_hybrid_kernels import PackedDocuments
from torch import Tensor, nn

from mamba_hybrid.loss import Distillation, distillation_loss
from mamba_hybrid.mixer import HybridMixer
from mamba_hybrid.model import Attention, Batch, HybridLayer, HybridMambaForCausalLM
from mamba_hybrid.source import Source

from .models import Wrapped


def soft_top_k(logit_I: Tensor, k: int, temperature: float) -> Tensor:
    """Values in (0, 1) that sum to k: the share of each logit in the k largest, softened by an entropy.

    They are sigmoid((logit - m) / temperature) with the m that makes the sum k, which is found by bisection; the
    gradient is that of the exact m. As the temperature falls, the k largest go to 1 and the others to 0.

    Args:
        logit_I: (I,) float.
        k: above 0 and below I.
        temperature: above 0.

    Returns:
        (I,), the logits' dtype.

    Source: the limited multi-label projection, arXiv 1906.08707, equations 3 and 8.

    Example:
        >>> soft_top_k(torch.tensor([3.0, 1.0, 0.0]), 1, 0.1).round(decimals=3)
        tensor([1., 0., 0.])
    """
    fixed_I = logit_I.detach().double()
    # sigmoids are below 1e-16 and above 1 - 1e-16 at these borders
    low, high = fixed_I.min() - 40 * temperature, fixed_I.max() + 40 * temperature
    for _ in range(100):
        middle = (low + high) / 2
        above = torch.sigmoid((fixed_I - middle) / temperature).sum() > k
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    m = ((low + high) / 2).to(logit_I.dtype)
    share_I = torch.sigmoid((logit_I - m) / temperature)
    slope_I = (share_I * (1 - share_I)).detach() / temperature
    # 0, but with the gradient of m: slope of the logits' sum over slope of m's
    move = (share_I.sum() - share_I.sum().detach()) / slope_I.sum().clamp(min=1e-30)
    return torch.sigmoid((logit_I - m - move) / temperature)


class Gates(nn.Module):
    """What a selection learns, and all of it that a checkpoint has to hold.

    Args:
        layers: I.
        budget: layers whose gates may be open together.
        rounds: of trials, see `SelectLayers`; row r holds the sums of round r over its labels: KL with each layer's
            gate opened beside those chosen before, KL without, and the number of labels.
    """

    def __init__(self, layers: int, budget: int, rounds: int) -> None:
        super().__init__()
        self.budget = budget
        self.logit_I = nn.Parameter(torch.zeros(layers))
        self.trials: Tensor
        self.register_buffer("trials", torch.zeros(rounds, layers + 2, dtype=torch.float64))

    def reset(self) -> None:
        """The start: all gates alike, nothing tried."""
        with torch.no_grad():
            self.logit_I.zero_()
            self.trials.zero_()

    def forward(self, temperature: float) -> Tensor:
        return soft_top_k(self.logit_I, self.budget, temperature)


class Blend(nn.Module):
    """gate attention + (1 - gate) mixer, in the place of a layer's attention.

    `gate` is set before each forward pass: a scalar tensor, or True or False, which run one of the two alone.
    """

    def __init__(self, attention: Attention, mixer: HybridMixer) -> None:
        super().__init__()
        self.attention, self.mixer = attention, mixer
        self.gate: Tensor | bool = False

    def forward(self, u_BLD: Tensor, batch: Batch) -> Tensor:
        gate = self.gate
        if gate is True:
            return self.attention(u_BLD, batch)
        mixed_BLD = self.mixer(u_BLD, batch.cos, batch.sin, batch.doc_BL, batch.first_D1)
        if gate is False:
            return mixed_BLD
        return gate * self.attention(u_BLD, batch) + (1 - gate) * mixed_BLD


def blend(layer: HybridLayer, attention: Attention) -> Blend:
    """Put an attention, frozen, beside a layer's mixer, in the mixer's dtype, with a gate between them."""
    assert layer.is_mixer
    dtype = layer.mixer.q_proj.weight.dtype
    both = Blend(attention.to(dtype).requires_grad_(False), layer.mixer)
    layer.add_module("self_attn", both)
    layer.is_mixer = False
    del layer.mixer
    return both


def recall_loss(h_BLD: Tensor, head_VD: Tensor, at_BA: Tensor, answer_BA: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the answers' cross-entropy in nats, and how many of them rank first.

    Args:
        h_BLD: normed hidden states (B, L, D).
        head_VD: the head (V, D), the same dtype.
        at_BA, answer_BA: int64, see `recall.recall_rows`.
    """
    h_BAD = h_BLD.gather(1, at_BA[..., None].expand(-1, -1, h_BLD.shape[-1]))
    logits = F.linear(h_BAD, head_VD).float().flatten(0, 1)
    answers = answer_BA.flatten()
    return F.cross_entropy(logits, answers, reduction="sum"), (logits.detach().argmax(-1) == answers).sum()


class Beside:
    """Where `Gated` finds its tensors: the attention in the teacher's checkpoint, all else in the student's."""

    def __init__(self, student: Source, teacher: Source) -> None:
        self.student, self.teacher = student, teacher

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """As `Source.tensor`, by the name that it has in `Gated`."""
        if ".self_attn.attention." in name:
            return self.teacher.tensor(name.replace(".self_attn.attention.", ".self_attn."), rows)
        return self.student.tensor(name.replace(".self_attn.mixer.", ".mixer."), rows)


class Gated(Wrapped):
    """A hybrid of mixers only with a Transformer's attention beside them, all frozen, and gates to train.

    Args:
        model: with a mixer in every layer; its layers are changed.
        teacher: with attention in every layer, which is copied.
        gates: as many as layers.
    """

    def __init__(self, model: HybridMambaForCausalLM, teacher: HybridMambaForCausalLM, gates: Gates) -> None:
        super().__init__()
        self.model, self.gates = model.eval(), gates
        self.blends = []
        for layer, other in zip(model.model.layers, teacher.model.layers, strict=True):
            assert isinstance(layer, HybridLayer) and isinstance(other, HybridLayer)
            self.blends.append(blend(layer, copy.deepcopy(other.self_attn)))

    def _hidden(
        self, tokens_BL: Tensor, documents: Tensor | PackedDocuments | None, gates: float | Sequence[bool]
    ) -> tuple[Tensor, Tensor]:
        if isinstance(gates, Sequence):
            values_I, each = torch.tensor(gates).float(), list(gates)
        else:
            values_I = self.gates(gates)
            each = list(values_I.unbind())
        for both, gate in zip(self.blends, each, strict=True):
            both.gate = gate
        return self.model.model(tokens_BL, document_ids=documents).last_hidden_state, values_I.detach()

    def forward(self, task: str, gates: float | Sequence[bool], *inputs: Any, **more: Any) -> Any:
        """One of the tasks below; FSDP has gathered the head for them.

        Args:
            task: "imitate" or "recall".
            gates: the temperature of the learnt ones, or which are open.
            inputs, more: of the task.
        """
        return getattr(self, f"_{task}")(gates, *inputs, **more)

    def _imitate(
        self, gates: float | Sequence[bool], tokens_BL: Tensor, documents: Tensor | PackedDocuments, labels_BL: Tensor,
        teacher: tuple[Tensor, Tensor], **loss: Any,
    ) -> tuple[Distillation, Tensor]:  # fmt: skip
        """Distance from the teacher, and the gates' values (I,)."""
        h_BLD, values_I = self._hidden(tokens_BL, documents, gates)
        labels = labels_BL.flatten()
        return distillation_loss(h_BLD.flatten(0, 1), self.head, *teacher, labels, **loss), values_I

    def _recall(
        self, gates: float | Sequence[bool], tokens_BL: Tensor, at_BA: Tensor, answer_BA: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `recall_loss`."""
        h_BLD, _ = self._hidden(tokens_BL, None, gates)
        return recall_loss(h_BLD, self.head, at_BA, answer_BA)
