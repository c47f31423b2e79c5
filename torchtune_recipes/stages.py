"""The recipes' steps, as `Stage` has them."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from omegaconf import DictConfig

from mamba_hybrid.config import HybridMambaConfig
from mamba_hybrid.errors import UserError
from mamba_hybrid.flops import alignment_flops, distillation_flops, gates_flops, preference_flops, trials_flops

from .activations import Pass, Shapes
from .align_hybrid import AlignHybrid
from .distill_hybrid import LOSS, DistillHybrid
from .dpo_hybrid import DpoHybrid, preference_loss
from .models import PARTS
from .recipe import check_keys
from .select_layers import METHODS, RECALL, SelectLayers
from .stage import Moment, Stage
from .traffic import Exchange, Layout


class Whole(Stage):
    """A stage that trains the whole student behind a teacher's forward pass, if it has a teacher."""

    def exchange(self) -> Exchange:
        # the student's layers come for the forward and for the backward pass
        return self.layers(self.teacher) + self.layers(self.student) * 2 + self.outside(self.student) + self.sums()

    def alone(self) -> Exchange:
        model, last = self.student, self.student.config.num_hidden_layers - 1
        ends = model.root(trained=True) + model.layer(0, trained=True)
        return (
            self.layer(self.teacher, 0) + self.outside(model) + self.layer(model, 0) + self.layer(model, last)
            + Exchange(summed=4 * ends, sums=2)
        )  # fmt: skip

    def kinds(self, mine: Shapes) -> list[Pass]:
        """Of each layer."""
        types = mine.config.layer_types or []
        of_kind = {kind: mine.layer(types.index(kind), grad=True) for kind in sorted(set(types))}
        return [of_kind[kind] for kind in types]


class Distillation(Whole):
    """`distill_hybrid`."""

    recipe = DistillHybrid

    def __init__(
        self, cfg: DictConfig, student: HybridMambaConfig, teacher: HybridMambaConfig | None, layout: Layout
    ) -> None:
        check_keys(cfg.get("loss") or {}, LOSS, "loss.")
        if (chunk := cfg.get("sequence_chunk")) is not None and chunk < cfg.dataset.max_seq_len:
            raise UserError(f"sequence_chunk {chunk}: what is planned are whole rows; set sequence_chunk=null")
        super().__init__(cfg, student, teacher, layout)

    def flops(self) -> float:
        frozen = self.frozen()
        return distillation_flops(
            self.student.config, self.teacher.config, self.length, lambda part: part not in frozen
        )  # fmt: skip

    def moments(self, batch: int) -> Iterator[Moment]:
        mine, theirs = (self.pieces(model, batch) for model in (self.student, self.teacher))
        yield self.teacher_forward(theirs)
        yield from self.through(
            mine,
            self.kinds(mine),
            {"loss": mine.loss(self.teacher.config, **(self.cfg.get("loss") or {}))},
            {
                "teacher's embeddings and head, gathered": self.root(self.teacher),
                "teacher's hidden states": theirs.hidden().nbytes,
            },
        )


class Preference(Whole):
    """`dpo_hybrid`, on rows that hold nothing but answers: no rows need more."""

    recipe = DpoHybrid

    @staticmethod
    def teacher_of(cfg: DictConfig) -> str | None:
        return (cfg.get("reference") or "teacher") if preference_loss(cfg.loss)[1] else None

    def flops(self) -> float:
        frozen, reference = self.frozen(), self.teacher.config if self.teacher.numel else None
        return preference_flops(self.student.config, reference, self.length, lambda part: part not in frozen)

    def moments(self, batch: int) -> Iterator[Moment]:
        chunk, mine = self.cfg.get("chunk_tokens", 512), self.pieces(self.student, batch)
        root = {"teacher's embeddings and head, gathered": self.root(self.teacher)}
        if self.teacher.numel:
            theirs = self.pieces(self.teacher, batch)
            yield self.teacher_forward(theirs)
            yield Moment(
                "teacher's log-probabilities",
                self.always() | self.gradients(0) | root | {
                    "teacher's hidden states": theirs.hidden().nbytes,
                    "log-probabilities, forward pass": theirs.log_probs(chunk, grad=False).forward,
                    "batch, mask and rotary tables": theirs.shared(),
                },
            )  # fmt: skip
        yield from self.through(mine, self.kinds(mine), {"log-probabilities": mine.log_probs(chunk, grad=True)}, root)


class Alignment(Stage):
    """`align_hybrid`, whose teacher ends with the last layer that something is learnt from."""

    recipe = AlignHybrid

    def __init__(
        self, cfg: DictConfig, student: HybridMambaConfig, teacher: HybridMambaConfig | None, layout: Layout
    ) -> None:
        assert teacher is not None
        if cfg.get("inputs") == "student":
            raise UserError("inputs student: what is planned is a step on the teacher's; set inputs=teacher")
        if (target := cfg.get("target") or "outputs") != "outputs":
            raise UserError(f"target {target}: what is planned is alignment to outputs; set target=outputs")
        layers = max(student.mixer_layers, default=-1) + 1
        shorter = copy.deepcopy(teacher)
        shorter.num_hidden_layers, shorter.layer_types = layers, (teacher.layer_types or [])[:layers]
        super().__init__(cfg, student, shorter, layout)

    def frozen(self) -> list[str]:
        return [part for part in PARTS if part != "mixers"]

    def flops(self) -> float:
        return alignment_flops(self.student.config, self.teacher.config, self.length)

    def exchange(self) -> Exchange:
        # a mixer, which runs alone, stays gathered until its backward pass, its core does not
        student = self.layers(self.student, ".mixer.") + self.layers(self.student, ".mixer.core.")
        return self.layers(self.teacher) + student + self.sums()

    def alone(self) -> Exchange:
        last = max(self.student.config.mixer_layers)
        return self.layer(self.teacher, 0) + Exchange(summed=4 * self.student.layer(last, trained=True), sums=2)

    def moments(self, batch: int) -> Iterator[Moment]:
        model = self.student
        mine, theirs = (self.pieces(m, batch) for m in (self.student, self.teacher))
        yield self.teacher_forward(theirs)
        mixers = model.config.mixer_layers
        aligned = mine.aligned(mixers[0])
        reduced = waiting = 0
        for i in mixers:
            unit = model.bytes(self.dtype, f".layers.{i}.", ".mixer.") if self.fsdp else 0
            yield Moment(
                f"backward pass of mixer {i}",
                self.always() | self.gradients(reduced) | {
                    "teacher's embeddings and head, gathered": self.root(self.teacher),
                    "layers, gathered": self.gathered(self.teacher, i) + unit * self.copies,
                    "a layer's input and the attention's": 3 * mine.hidden().nbytes,
                    "activations of a mixer": aligned.backward,
                    "batch, mask and rotary tables": mine.shared() + theirs.shared(),
                    "mixer's gradients being reduced": waiting,
                },
            )  # fmt: skip
            trained = model.layer(i, trained=True)
            reduced, waiting = reduced + trained, 4 * trained * self.fsdp
        yield self.step()


class Selection(Stage):
    """`select_layers`: all is frozen but the gates, which are a number a layer. Trials are planned at their first step,
    when the most layers are left to try."""

    recipe = SelectLayers
    keep = 0.0

    def __init__(
        self, cfg: DictConfig, student: HybridMambaConfig, teacher: HybridMambaConfig | None, layout: Layout
    ) -> None:
        assert teacher is not None
        check_keys(cfg.get("recall") or {}, RECALL, "recall.")
        if cfg.method not in METHODS or cfg.method == "uniform":
            raise UserError(f"method {cfg.method!r}: what is planned are steps of {', '.join(METHODS[:-1])}")
        n, theirs = student.num_hidden_layers, teacher.num_hidden_layers
        if len(student.mixer_layers) != n or teacher.mixer_layers or n != theirs:
            raise UserError(
                f"student {cfg.student} has {n} layers, {len(student.mixer_layers)} with a mixer, teacher "
                f"{cfg.teacher} {theirs}, {len(teacher.mixer_layers)} with one; "
                "it must be all and none: convert with --keep 0"
            )
        super().__init__(cfg, student, teacher, layout)
        attention = {name: size for name, size in self.teacher.numel.items() if ".self_attn." in name}
        self.student.numel |= attention  # beside the mixers
        self.gates = cfg.method == "gates"
        recall = cfg.get("recall") or {}
        self.pairs, self.recalls = recall.get("pairs", 16), bool(recall.get("weight"))

    def frozen(self) -> list[str]:
        return list(PARTS)

    def parameters(self) -> dict[str, int]:
        dtype = (self.student.config.dtype or torch.float32) if self.sharded(self.student) else self.dtype
        return {f"student's parameters, {dtype}".replace("torch.", ""): self.shard(self.student.bytes(dtype))}

    def saved(self) -> float:
        return 0.0  # the gates

    def flops(self) -> float:
        models = self.student.config, self.teacher.config, self.length
        if self.gates:
            return gates_flops(*models, asked=self.pairs if self.recalls else 0)
        return trials_flops(*models, chosen=0)

    def exchange(self) -> Exchange:
        student = self.layers(self.student)
        if self.gates:
            return self.layers(self.teacher) + (student * 2 + self.outside(self.student)) * (1 + self.recalls)
        return self.layers(self.teacher) + student * (1 + self.student.config.num_hidden_layers)

    def alone(self) -> Exchange:
        first = self.layer(self.teacher, 0) + self.layer(self.student, 0)
        if not self.gates:
            return first
        last = self.layer(self.student, self.student.config.num_hidden_layers - 1)
        return first + last + self.outside(self.student)

    def moments(self, batch: int) -> Iterator[Moment]:
        mine, theirs = (self.pieces(model, batch) for model in (self.student, self.teacher))
        yield self.teacher_forward(theirs)
        n, loss = self.student.config.num_hidden_layers, {"chunk_tokens": self.cfg.get("chunk_tokens", 512)}
        kept = {
            "teacher's embeddings and head, gathered": self.root(self.teacher),
            "teacher's hidden states": theirs.hidden().nbytes,
        }
        if self.gates:
            losses = {"loss": mine.loss(self.teacher.config, **loss)}
            if self.recalls:
                losses["recall"] = mine.recall(self.pairs, grad=True)
            yield from self.through(mine, [mine.blend(0)] + [mine.blend(n - 1)] * (n - 1), losses, kept)
            return
        common = self.always() | kept | {
            "student's embeddings and head, gathered": self.root(self.student),
            "batch, mask and rotary tables": mine.shared(),
        }  # fmt: skip
        layer = max(piece.layer(0, grad=False).forward for piece in (mine, theirs))
        hidden = {"hidden states": mine.hidden().nbytes}
        gathered = {"layers, gathered": self.gathered(self.student, 0)}
        yield Moment("student's forward pass", common | hidden | gathered | {"activations of a layer": layer})
        for name, piece in (
            ("loss", mine.loss(self.teacher.config, grad=False, **loss)),
            ("recall", mine.recall(self.pairs, grad=False)),  # when all is done and measured
        ):
            yield Moment(name, common | hidden | {f"{name}, forward pass": piece.forward})


STAGES: dict[str, type[Stage]] = {
    "distill_hybrid": Distillation,
    "align_hybrid": Alignment,
    "dpo_hybrid": Preference,
    "select_layers": Selection,
}
