"""Which layers keep their attention, when a hybrid may keep so many.

Shapes: I layers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mamba_hybrid.convert import attention_layers
from mamba_hybrid.errors import UserError
from mamba_hybrid.flops import gates_flops, trials_flops
from mamba_hybrid.loss import IGNORED
from mamba_hybrid.model import HybridMambaForCausalLM
from mamba_hybrid.source import Source

from .data import load_tokenizer
from .gates import Beside, Gated, Gates
from .loading import fill
from .models import PARTS, Teacher, shard
from .packing import Batch, PackedRows
from .recall import ordinary_tokens, recall_rows
from .recipe import FIXED, OPTIONAL, REQUIRED, HybridRecipe, check_keys, command
from .recipe import run as run_recipe

METHODS = ("gates", "leave_one_out", "greedy", "uniform")
SAME = ("hidden_size", "num_hidden_layers", "head_dim", "rope_parameters")
RECALL = ("weight", "pairs")
RESULT = "layers.json"


class SelectLayers(HybridRecipe):
    """Chooses `attention_layers` of the layers, given a Transformer and a hybrid of it with mixers only.

    Methods:
        gates: each layer is gate attention + (1 - gate) mixer, and the gates, which sum to `attention_layers`, learn
            to bring the whole near the Transformer's distributions and to recall pairs of tokens from a long text;
            their temperature falls, so that they end near 0 and 1. The layers with the largest are chosen.
        leave_one_out: how much the KL falls when one layer of mixers gets its attention back; the layers with the
            largest fall are chosen.
        greedy: the same in a round for each layer to choose, beside those chosen in the rounds before.
        uniform: evenly spread.

    Source: gates, arXiv 2606.30562; leave_one_out, arXiv 2512.20569.
    """

    takes = PackedRows  # recall rows are made of any row, and evaluated are those of the first steps
    doing = "selecting"
    result = RESULT
    required = (*(k for k in REQUIRED if k != "mixer_lr"), "method", "attention_layers", "gate_lr")
    optional = (
        *OPTIONAL,
        "temperature",
        "recall",
        "evaluation_steps",
        "chunk_tokens",
        "enable_activation_checkpointing",
    )
    fixed = (*(k for k in FIXED if k != "mixer_lr"), "method", "attention_layers", "gate_lr", "temperature", "recall")
    student: Gated

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        if cfg.method not in METHODS:
            raise UserError(f"method {cfg.method!r} is none of {', '.join(METHODS)}")
        for key in ("attention_layers", "evaluation_steps", "chunk_tokens"):
            value = cfg.get(key, 1)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{key} {value!r} must be a whole number above 0")
        self.temperature = list(cfg.get("temperature") or (1.0, 0.1))
        if len(self.temperature) != 2 or not all(isinstance(t, (int, float)) and t > 0 for t in self.temperature):
            raise UserError(f"temperature {self.temperature} must be two numbers above 0, for the first and last step")
        recall = cfg.get("recall") or {}
        check_keys(recall, RECALL, "recall.")
        self.recall_weight, self.pairs = recall.get("weight", 0.0), recall.get("pairs", 16)
        if not self.recall_weight >= 0 or not isinstance(self.pairs, int) or self.pairs < 1:
            raise UserError(
                f"recall.weight {self.recall_weight} must be at least 0, recall.pairs {self.pairs} at least 1"
            )
        self.loss = {"chunk_tokens": cfg.get("chunk_tokens", 512)}

    def frozen(self) -> list[str]:
        return list(PARTS)

    def build(self, student: HybridMambaForCausalLM, teacher: HybridMambaForCausalLM, mesh: DeviceMesh) -> None:
        mine, theirs, budget = student.config, teacher.config, self.cfg.attention_layers
        self.layers = mine.num_hidden_layers
        for name in SAME:
            if getattr(mine, name) != getattr(theirs, name):
                raise UserError(
                    f"{name} of student {self.cfg.student} is {getattr(mine, name)}, of teacher {self.cfg.teacher} "
                    f"{getattr(theirs, name)}; both must be of one model"
                )
        if theirs.mixer_layers:
            raise UserError(f"teacher {self.cfg.teacher} has mixers in layers {theirs.mixer_layers}; it must have none")
        if missing := sorted(set(range(self.layers)) - set(mine.mixer_layers)):
            raise UserError(
                f"student {self.cfg.student} has no mixer in layers {missing}; convert the teacher with --keep 0"
            )
        if budget >= self.layers:
            raise UserError(f"attention_layers {budget} must be below the {self.layers} layers of {self.cfg.student}")
        self.vocabulary = ordinary_tokens(load_tokenizer(self.cfg.student), student.vocab_size)
        recall_rows(torch.from_numpy(self.data.tokens_RL[:1]).long(), self.vocabulary, self.pairs, [0])  # do they fit?
        method = self.cfg.method
        if method == "uniform":
            self.steps = 0
        if method == "greedy" and self.steps < budget:
            raise UserError(f"greedy takes a round for each of {budget} attention_layers, there are {self.steps} steps")
        self.measured = ("loss", *(f"kl_layer_{i}" for i in range(self.layers)))
        if method == "gates":
            recalled = ("recall_loss", "recall_accuracy") if self.recall_weight else ()
            self.measured = ("loss", "kl", *recalled, *(f"gate_layer_{i}" for i in range(self.layers)))

        gates = Gates(self.layers, budget, rounds=budget if method == "greedy" else 1)
        self.student, self.teacher = Gated(student, teacher, gates), Teacher(teacher)
        exact = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
        fully_shard(gates, mesh=mesh, mp_policy=exact)
        compute, recomputed = (bool(self.cfg.get(k)) for k in ("compile", "enable_activation_checkpointing"))
        shard(self.student, mesh, self.dtype, compute_layers=compute, checkpoint_activations=int(recomputed))
        shard(self.teacher, mesh, self.dtype, compute_layers=compute, offload=self.offload)

    def fill(self, student: Source, teacher: Source) -> None:
        fill(self.student, Beside(student, teacher), self.device)
        self.student.gates.reset()
        fill(self.teacher, teacher, self.device, offload=self.offload)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        return [{"name": "gate", "params": [self.student.gates.logit_I], "lr": self.cfg.gate_lr, "weight_decay": 0.0}]

    def load_checkpoint(self, **_: Any) -> None:
        """Resume from the newest whole checkpoint, if there is one; it holds the gates alone."""
        self.step = self.checkpoints.load_latest(self.student.gates, self.optimizer, self._settings())
        if self.step and self.rank == 0:
            print(f"resuming after step {self.step} of {self.steps}", flush=True)

    def save_checkpoint(self, **_: Any) -> None:
        """Write training state for this step, its metrics first."""
        self.read_metrics()
        self.checkpoints.save(self.step, self.student.gates, self.optimizer, self._settings())

    def flops(self) -> float:
        models = self.student.model.config, self.teacher.model.config, self.data.length
        if self.cfg.method == "gates":
            return gates_flops(*models, asked=self.pairs if self.recall_weight else 0)
        return trials_flops(*models, chosen=self._round(self.step - 1))  # each round has chosen one

    def learn(self, batch: Batch, counted: int) -> Tensor:
        with torch.no_grad():
            target = self.teacher(batch.tokens, batch.documents)
        return self._train_gates(batch, target, counted) if self.cfg.method == "gates" else self._try(batch, target)

    def _train_gates(self, batch: Batch, target: tuple[Tensor, Tensor], counted: int) -> Tensor:
        first, last = self.temperature
        temperature = first * (last / first) ** (self.step / max(self.steps - 1, 1))
        losses, values_I = self.student("imitate", temperature, *batch, target, **self.loss)
        (losses.loss / counted).backward()
        loss, recalled = losses.kl.detach(), []
        if self.recall_weight:
            # sums that are divided by the labels later become means over the answers
            scale = counted / (self.rows_per_step * self.pairs)
            ce, right = self.student("recall", temperature, *self._recall_rows(batch.tokens, self.step))
            (ce * self.recall_weight * scale / counted).backward()
            recalled = [ce.detach() * scale, right * scale]
            loss = loss + self.recall_weight * recalled[0]
        share = counted / (self.world * self.accumulate)
        return torch.cat([torch.stack([loss, losses.kl, *recalled]).float(), values_I.float() * share])

    def _recall_rows(self, tokens_BL: Tensor, step: int) -> tuple[Tensor, ...]:
        rows = recall_rows(tokens_BL, self.vocabulary, self.pairs, [self.cfg.get("seed", 0), step])
        return tuple(t.to(self.device) for t in rows)

    @torch.no_grad()
    def _try(self, batch: Batch, target: tuple[Tensor, Tensor]) -> Tensor:
        """Sums of a batch's KL without further attention, and with it in each layer."""
        gates, now = self.student.gates, self._round(self.step)
        chosen = self.choose(gates.trials[:now])[0]

        def kl(layers: list[int]) -> Tensor:
            return self.student("imitate", self._open(layers), *batch, target, **self.loss)[0].kl

        before = kl(chosen)
        sums = [before if i in chosen else kl([*chosen, i]) for i in range(self.layers)]
        row = torch.stack([*sums, before, (batch.labels != IGNORED).sum()]).double()
        dist.all_reduce(row)
        gates.trials[now] += row
        gates.logit_I.grad = torch.zeros_like(gates.logit_I)  # which the optimizer's step asks for
        return torch.stack([before, *sums]).float()

    def _round(self, step: int) -> int:
        """Which round of trials a step belongs to."""
        return step * len(self.student.gates.trials) // self.steps

    def _open(self, layers: list[int]) -> list[bool]:
        return [i in layers for i in range(self.layers)]

    def choose(self, trials: Tensor) -> tuple[list[int], list[float]]:
        """Layers chosen in the rounds given (rows of `Gates.trials`), and the last fall of each layer's KL per token.

        Each round chooses its share of the budget.
        """
        chosen: list[int] = []
        scores = [0.0] * self.layers
        for row in trials.tolist():
            *with_layer, before, labels = row
            left = [i for i in range(self.layers) if i not in chosen]
            for i in left:
                scores[i] = (before - with_layer[i]) / labels
            chosen += sorted(left, key=lambda i: -scores[i])[
                : self.cfg.attention_layers // len(self.student.gates.trials)
            ]
        return chosen, scores

    def _selection(self) -> tuple[list[int], list[float] | None]:
        """The layers that keep attention, ascending, and the scores of all."""
        gates, budget = self.student.gates, self.cfg.attention_layers
        if self.cfg.method == "uniform":
            return attention_layers(self.layers, budget / self.layers), None
        if self.cfg.method != "gates":
            chosen, scores = self.choose(gates.trials)
            return sorted(chosen), scores
        logit_I = gates.logit_I.detach()
        whole_I = logit_I.full_tensor() if isinstance(logit_I, DTensor) else logit_I
        scores = whole_I.tolist()
        return sorted(sorted(range(self.layers), key=lambda i: -scores[i])[:budget]), scores

    def export(self) -> None:
        """Write output_dir/layers.json: what was chosen, and how far that is from the teacher."""
        chosen, scores = self._selection()
        evenly = attention_layers(self.layers, self.cfg.attention_layers / self.layers)
        found = self._evaluate({"chosen": chosen, "uniform": evenly, "mixers only": []})
        if self.rank == 0:
            result = {
                "method": self.cfg.method,
                "layers": self.layers,
                "budget": self.cfg.attention_layers,
                "attention_layers": chosen,
                "scores": scores,
                "evaluation": found,
                "settings": OmegaConf.to_container(self.cfg, resolve=True),
            }
            out = Path(self.cfg.output_dir)
            out.mkdir(parents=True, exist_ok=True)
            work = out / f"{RESULT}.tmp"
            work.write_text(json.dumps(result, indent=1))
            work.replace(out / RESULT)
            print(f"attention stays in layers {', '.join(map(str, chosen))}", flush=True)
            for name, values in found.items():
                print(f"{name:12} KL {values['kl']:.4f}  agreement {values['agreement']:.3f}  "
                      f"recall {values['recall']:.3f}", flush=True)  # fmt: skip
        dist.barrier()

    @torch.no_grad()
    def _evaluate(self, sets: dict[str, list[int]]) -> dict[str, dict[str, Any]]:
        """KL and top-1 agreement of some choices with the teacher, and their share of recalled pairs."""
        sums = torch.zeros(len(sets), 5, dtype=torch.float64, device=self.device)
        for step in range(min(self.cfg.get("evaluation_steps", 4), self.order.steps_per_epoch)):
            for rows in self.order.micro_batches(step):
                batch = self.data.batch(rows).to(self.device)
                target = self.teacher(batch.tokens, batch.documents)
                asked = self._recall_rows(batch.tokens, self.steps + step)
                for row, layers in zip(sums, sets.values(), strict=True):
                    d, _ = self.student("imitate", self._open(layers), *batch, target, **self.loss)
                    _, right = self.student("recall", self._open(layers), *asked)
                    row += torch.stack([d.kl, d.agree, d.tokens, right, right.new_tensor(asked[1].numel())]).double()
        dist.all_reduce(sums)
        return {
            name: {"attention_layers": layers, "kl": kl / tokens, "agreement": agree / tokens, "recall": right / asked}
            for (name, layers), (kl, agree, tokens, right, asked) in zip(sets.items(), sums.tolist(), strict=True)
        }


@command
def main(cfg: DictConfig) -> int:
    """Choose attention layers: tune run [--nproc_per_node N] select_layers --config FILE [key=value ...]"""
    return run(cfg)


def run(cfg: DictConfig) -> int:
    """The recipe; see `recipe.run`."""
    return run_recipe(SelectLayers, cfg)
