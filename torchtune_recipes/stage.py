"""A recipe's step as one GPU sees it: what is alive at its moments, what FSDP moves.

Shapes: B rows of one micro-batch, L tokens of a row.

Memory is the most that is alive at one moment of a step, so a step is gone through moment by moment. Parameters are
counted on models without memory, activations by `activations`; what FSDP2 gathers and reduces follows from
`models.shard`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from torch import nn

from mamba_hybrid.config import HybridMambaConfig

from .activations import Live, Pass, Shapes
from .models import PARTS
from .parameters import Parameters
from .recipe import DTYPES, HybridRecipe, component
from .traffic import Exchange, Layout


@dataclass(frozen=True)
class Moment:
    """What is alive at one moment of a step on one GPU.

    Args:
        name: of the moment.
        bytes: of each kind of thing.
    """

    name: str
    bytes: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


def optimizer_bytes(node: DictConfig) -> tuple[float, float]:
    """Bytes for each trained parameter that an optimiser keeps, and that it needs besides while it steps.

    The optimiser takes a step on a small parameter, so that any class is known.
    """
    p = nn.Parameter(torch.zeros(512, 512))
    optimizer = component("optimizer", node, [{"params": [p], "lr": 1e-3}])
    p.grad = torch.ones_like(p)
    with torch.compiler.set_stance("force_eager"):  # some compile their steps
        optimizer.step()
    kept = sum(_nbytes(t) for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))
    with torch.compiler.set_stance("force_eager"), Live() as live:
        optimizer.step()
    # PyTorch's, without `fused`, step a whole list of tensors at once, with what is made on the way for all of them;
    # torchao's and ours compile their steps
    alone = node.get("fused") or str(node["_component_"]).startswith(("torchao.", "torchtune_recipes."))
    return kept / p.numel(), 0.0 if alone else live.peak / p.numel()


def _nbytes(t: torch.Tensor) -> int:
    if hasattr(t, "__tensor_flatten__"):
        names, _ = t.__tensor_flatten__()
        return sum(_nbytes(getattr(t, name)) for name in names)
    return t.nbytes


class Stage:
    """A recipe's step, seen from one GPU.

    Args:
        cfg: the recipe's configuration.
        student, teacher: the models' configurations; no teacher where `teacher_of` says so.
        layout: of the GPUs.

    Raises:
        UserError: a setting that does not fit.
    """

    recipe: type[HybridRecipe]
    keep = 0.5  # share of attention of a student that is still a plain Transformer

    def __init__(
        self, cfg: DictConfig, student: HybridMambaConfig, teacher: HybridMambaConfig | None, layout: Layout
    ) -> None:
        self.cfg, self.layout = cfg, layout
        self.gpus = layout.shard  # that share one copy of the models
        self.offload = bool(cfg.get("offload_teacher"))
        self.dtype, self.length = DTYPES[cfg.dtype], int(cfg.dataset.max_seq_len)
        self.accumulate = cfg.get("gradient_accumulation_steps") or 1
        self.student, self.teacher = Parameters(student, self.frozen()), Parameters(teacher, list(PARTS))
        self.state, self.stepping = optimizer_bytes(cfg.optimizer)
        # FSDP has what it gathers twice, as one buffer and as parameters, or the next unit's buffer beside this unit's
        self.copies = 1 if self.gpus == 1 else 2
        self.fsdp = layout.gpus > 1  # one GPU's parameters are cast where they are multiplied with

    @staticmethod
    def teacher_of(cfg: DictConfig) -> str | None:
        """The key of the configuration that names the teacher, None where there is none."""
        return "teacher"

    def frozen(self) -> list[str]:
        """Parts of the student that are not trained."""
        return list(self.cfg.get("freeze") or [])

    def flops(self) -> float:
        """Model FLOPs of one token."""
        raise NotImplementedError

    def moments(self, batch: int) -> Iterator[Moment]:
        """The moments of a step that can be the fullest, with so many rows in a micro-batch."""
        raise NotImplementedError

    def exchange(self) -> Exchange:
        """What FSDP moves for one micro-batch. A teacher's embeddings and head stay gathered between steps."""
        raise NotImplementedError

    def alone(self) -> Exchange:
        """What of it is moved while nothing can be computed: before a pass begins, and after the last one ends."""
        raise NotImplementedError

    def peak(self, batch: int) -> Moment:
        """The fullest moment."""
        return max(self.moments(batch), key=lambda m: m.total)

    def shard(self, number: float) -> int:
        """One GPU's share."""
        return int(number / self.gpus)

    def always(self) -> dict[str, int]:
        """What lies on the GPU all the time."""
        return self.parameters() | {
            "optimiser's moments": self.shard(self.state * self.student.count(trained=True)),
            "teacher": 0 if self.offload else self.shard(self.teacher.bytes(self.dtype)),
        }

    def parameters(self) -> dict[str, int]:
        """The student's, as they lie there."""
        return {"student's parameters, fp32": self.shard(4 * self.student.count())}

    def saved(self) -> float:
        """Bytes of a training checkpoint."""
        return 4 * self.student.count() + self.state * self.student.count(trained=True)

    def loaded(self) -> int:
        """Bytes of the models' files, which each copy reads when a run starts."""
        models = [m for m in (self.student, self.teacher) if m.numel]
        return sum(m.bytes(m.config.dtype or torch.float32) for m in models)

    def layers(self, model: Parameters, *keys: str) -> Exchange:
        """All layers gathered once, or the units in them whose parameters have the keys."""
        return Exchange(gathered=model.bytes(self.dtype, ".layers.", *keys), gathers=model.units(*keys))

    def layer(self, model: Parameters, index: int) -> Exchange:
        """One layer gathered."""
        one = f".layers.{index}."
        return Exchange(gathered=model.bytes(self.dtype, one), gathers=model.units(one)) if model.numel else Exchange()

    def outside(self, model: Parameters) -> Exchange:
        """Embeddings, last norm and head gathered."""
        return Exchange(gathered=self.root(model), gathers=1)

    def sums(self) -> Exchange:
        """All gradients summed."""
        model = self.student
        units = model.units(trained=True) + bool(model.root(trained=True))
        return Exchange(summed=4 * model.count(trained=True), sums=units)

    def gradients(self, number: int) -> dict[str, int]:
        """Sharded gradients of so many parameters, or of all that are trained when steps before this have made them."""
        number = number if self.accumulate == 1 else self.student.count(trained=True)
        return {"gradients, fp32": self.shard(4 * number)}

    def sharded(self, model: Parameters) -> bool:
        """Whether FSDP gathers it: see `models.shard`."""
        return self.fsdp or (self.offload and model is self.teacher)

    def root(self, model: Parameters) -> int:
        """Bytes of embeddings, last norm and head, gathered."""
        return model.root() * self.dtype.itemsize if self.sharded(model) else 0

    def gathered(self, model: Parameters, layer: int) -> int:
        """Bytes of a layer, gathered, and of the one that is on its way."""
        return model.bytes(self.dtype, f".layers.{layer}.") * self.copies if self.sharded(model) else 0

    def step(self) -> Moment:
        """The optimiser's step."""
        trained = self.student.count(trained=True)
        gradients = self.shard(4 * trained)
        return Moment(
            "optimiser's step",
            self.always()
            | {
                "teacher's embeddings and head, gathered": self.root(self.teacher),
                "gradients, fp32": gradients,
                "optimiser's arrays": self.shard(self.stepping * trained),
            },
        )

    def teacher_forward(self, shapes: Shapes) -> Moment:
        """The teacher's forward pass, at its largest layer."""
        kinds = {shapes.config.layer_types[i]: i for i in range(shapes.config.num_hidden_layers)}  # type: ignore[index]
        most = max(shapes.layer(i, grad=False).forward for i in kinds.values())
        return Moment(
            "teacher's forward pass",
            self.always() | self.gradients(0) | {
                "teacher's embeddings and head, gathered": self.root(self.teacher),
                "layers, gathered": max(self.gathered(self.teacher, i) for i in kinds.values()),
                "activations of a layer": shapes.hidden().nbytes + most,
                "batch, mask and rotary tables": shapes.shared(),
            },
        )  # fmt: skip

    def host(self) -> int:
        """Bytes of host memory that the models take of a process: the rows of one tensor at a time while checkpoints
        are read, and the share of a teacher that stays there."""
        models = [m for m in (self.student, self.teacher) if m.numel]
        largest = max(self.shard(4 * m.config.vocab_size * m.config.hidden_size) for m in models)
        return largest + (self.shard(self.teacher.count() * self.dtype.itemsize) if self.offload else 0)

    def through(
        self, mine: Shapes, layers: list[Pass], losses: dict[str, Pass], kept: dict[str, int]
    ) -> Iterator[Moment]:
        """From a loss on: the backward pass through the whole student, and the optimiser's step.

        Args:
            mine: the student's pieces.
            layers: of each layer.
            losses: what stands behind the layers, by name; each has a pass through the layers of its own.
            kept: what there is beside.
        """
        model, n, hidden = self.student, len(layers), mine.hidden().nbytes
        every = (
            (self.cfg.get("activation_checkpoint_every") or 1) if self.cfg.get("enable_activation_checkpointing") else 0
        )
        again = [bool(every) and i % every == 0 for i in range(n)]
        kept_of = [hidden if again[i] else layer.kept for i, layer in enumerate(layers)]
        common = self.always() | kept | {
            "student's embeddings and head, gathered": self.root(model),
            "batch, mask and rotary tables": mine.shared(),
        }  # fmt: skip
        entry = hidden  # again: the last layer's output; else the first layer's input, which no layer before it kept
        inputs = "layer inputs kept" if all(again) else "activations kept"
        before = common | self.gradients(0) | {inputs: sum(kept_of) + entry + mine.norm().kept}
        for name, loss in losses.items():
            yield Moment(name, before | {f"{name}, forward pass": loss.forward})
            yield Moment(f"{name}, backward pass", before | {f"{name}, its gradients": loss.backward})
        config = model.config
        table = config.vocab_size * config.hidden_size
        head = table * model.trains("lm_head.weight") * (self.dtype.itemsize if self.fsdp else 4)
        reduced, waiting = 0, 0
        for i in reversed(range(n)):
            yield Moment(
                f"backward pass of layer {i}",
                common | self.gradients(reduced) | {
                    "head's gradient": head,
                    inputs: sum(kept_of[:i]) + entry + hidden * again[i],
                    "a layer computed again" if again[i] else "a layer's backward pass": layers[i].backward,
                    "layers, gathered": self.gathered(model, i),
                    "layer's gradients being reduced": waiting,
                },
            )  # fmt: skip
            trained = model.layer(i, trained=True)
            reduced, waiting = reduced + trained, 4 * trained * self.fsdp
        if root := model.root(trained=True):
            tied = config.tie_word_embeddings
            # without FSDP the embeddings' is what is kept or, if they are one with the head, rows and their sum with it
            rows = mine.hidden().numel()
            made = root * self.dtype.itemsize * (1 + tied) if self.fsdp else 4 * (table + rows) * tied
            yield Moment(
                "gradients of embeddings and head",
                common | self.gradients(reduced + root) | {
                    "embeddings' and head's gradients": made,
                    "being reduced": waiting + 4 * root * self.fsdp,
                },
            )  # fmt: skip
        yield self.step()

    def pieces(self, model: Parameters, batch: int) -> Shapes:
        """A model's, on a micro-batch."""
        masters = not self.fsdp and model.count(trained=True) > 0
        return Shapes(model.config, batch, self.length, self.dtype, lambda name: model.trains(name), masters=masters)
