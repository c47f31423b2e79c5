"""Alignment: each mixer learns to answer as the attention in its place does, from that attention's own input."""

from __future__ import annotations

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mamba_hybrid.errors import UserError
from mamba_hybrid.flops import alignment_flops
from mamba_hybrid.model import HybridMambaForCausalLM

from .models import PARTS, Aligner, Teacher, compile_parts, shard
from .packing import Batch
from .recipe import FIXED, OPTIONAL, HybridRecipe, command
from .recipe import run as run_recipe


class AlignHybrid(HybridRecipe):
    """The cheap stage before distillation: no logits, no backward pass through what is not trained, all layers in one
    forward pass of the teacher, and no error that one layer hands to the next. A second run with `inputs: student`
    teaches each mixer on what it will read: the errors of the layers before are in that. `target: matrices`, before
    these, teaches each mixer the attention's weights instead of its output (`mamba_hybrid.matrices`)."""

    doing = "aligning"
    optional = (*OPTIONAL, "inputs", "target")
    fixed = (*FIXED, "inputs", "target")

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        self.inputs = cfg.get("inputs") or "teacher"
        if self.inputs not in ("teacher", "student"):
            raise UserError(f"inputs {self.inputs!r} is none of teacher, student")
        self.target = cfg.get("target") or "outputs"
        if self.target not in ("outputs", "matrices"):
            raise UserError(f"target {self.target!r} is none of outputs, matrices")

    def frozen(self) -> list[str]:
        return [part for part in PARTS if part != "mixers"]

    def build(self, student: HybridMambaForCausalLM, teacher: HybridMambaForCausalLM, mesh: DeviceMesh) -> None:
        mine, theirs = student.config, teacher.config
        for name in ("hidden_size", "num_hidden_layers"):
            if getattr(mine, name) != getattr(theirs, name):
                raise UserError(
                    f"{name} of student {self.cfg.student} is {getattr(mine, name)}, of teacher {self.cfg.teacher} "
                    f"{getattr(theirs, name)}; layers are aligned one by one"
                )
        odd = sorted(set(mine.mixer_layers) & set(theirs.mixer_layers))
        if odd or not mine.mixer_layers:
            raise UserError(
                f"teacher {self.cfg.teacher} must have attention where student {self.cfg.student} has mixers (layers "
                f"{list(mine.mixer_layers)}); it has mixers too in {odd}"
            )
        if self.target == "matrices":
            self._check_matrices(student, teacher)
        self.measured = ("loss", *(f"loss_layer_{i}" for i in mine.mixer_layers))
        compute = bool(self.cfg.get("compile"))
        del teacher.model.layers[max(mine.mixer_layers) + 1 :]  # nothing is learnt from what comes after
        if compute:
            compile_parts(teacher)
        self.student, self.teacher = (
            Aligner(student, matrices=self.target == "matrices", compute=compute),
            Teacher(teacher),
        )
        shard(self.student, mesh, self.dtype, masters=True, compute_layers=compute, mixers_alone=True)
        shard(self.teacher, mesh, self.dtype, attention_alone=self.inputs == "student", offload=self.offload)

    def _check_matrices(self, student: HybridMambaForCausalLM, teacher: HybridMambaForCausalLM) -> None:
        mine, theirs = student.config, teacher.config
        if mine.short_conv:
            raise UserError(
                f"target matrices: the mixers of student {self.cfg.student} have a short convolution (short_conv "
                f"{mine.short_conv}), which mixes tokens too and not by a matrix; set target=outputs"
            )
        if mine.num_attention_heads != theirs.num_attention_heads:
            raise UserError(
                f"target matrices: num_attention_heads of student {self.cfg.student} is {mine.num_attention_heads}, of "
                f"teacher {self.cfg.teacher} {theirs.num_attention_heads}; set target=outputs"
            )

    def flops(self) -> float | None:
        if self.inputs == "student" or self.target == "matrices":
            return None
        return alignment_flops(self.student.model.config, self.teacher.model.config, self.data.length)

    def learn(self, batch: Batch, counted: int) -> Tensor:
        assert isinstance(self.student, Aligner) and isinstance(self.teacher, Teacher)
        sums_I = self.student.align(self.teacher, *batch, counted, on_student=self.inputs == "student")
        return torch.cat([sums_I.mean()[None], sums_I])


@command
def main(cfg: DictConfig) -> int:
    """Align a hybrid: tune run [--nproc_per_node N] align_hybrid --config FILE [key=value ...]"""
    return run(cfg)


def run(cfg: DictConfig) -> int:
    """The recipe; see `recipe.run`."""
    return run_recipe(AlignHybrid, cfg)
