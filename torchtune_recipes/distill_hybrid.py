"""KD-SFT: train a hybrid student to a frozen teacher's distributions."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mamba_hybrid.carry import Carry
from mamba_hybrid.errors import UserError
from mamba_hybrid.flops import distillation_flops
from mamba_hybrid.loss import check_divergence
from mamba_hybrid.model import HybridMambaForCausalLM

from .data import load_tokenizer
from .models import Student, Teacher, compute_in_fp8, shard
from .packing import Batch
from .recipe import FIXED, OPTIONAL, REQUIRED, HybridRecipe, check_keys, command
from .recipe import run as run_recipe
from .samples import Samples
from .streams import Streams

LOSS = ("kl_weight", "ce_weight", "temperature", "chunk_tokens", "divergence", "skew", "beta")


class DistillHybrid(HybridRecipe):
    """The student's next-token distributions become the teacher's."""

    doing = "distilling"
    required = (*REQUIRED, "rest_lr")
    optional = (
        *OPTIONAL, "freeze", "loss", "fp8", "enable_activation_checkpointing", "activation_checkpoint_every",
        "sequence_chunk", "log_layers_every", "samples",
    )  # fmt: skip
    fixed = (*FIXED, "rest_lr", "freeze", "loss", "fp8", "sequence_chunk")
    measured: tuple[str, ...] = ("loss", "kl", "ce", "agreement")

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        loss = cfg.get("loss") or {}
        check_keys(loss, LOSS, "loss.")
        self.chunk = cfg.get("sequence_chunk")
        if self.chunk is not None and (not isinstance(self.chunk, int) or self.chunk < 1):
            raise UserError(f"sequence_chunk {self.chunk!r} must be a whole number above 0, or null for whole rows")
        self._check_loss(loss)
        if cfg.get("fp8"):
            self._check_fp8()
        if not isinstance(self._every(), int) or self._every() < 1:
            raise UserError(f"activation_checkpoint_every {self._every()!r} must be a whole number above 0, 1 for all")
        self.layers_every = cfg.get("log_layers_every")
        if self.layers_every is not None and (not isinstance(self.layers_every, int) or self.layers_every < 1):
            raise UserError(f"log_layers_every {self.layers_every!r} must be a whole number above 0, or null for never")
        if self.layers_every and self.chunk:
            raise UserError("log_layers_every compares whole rows; set it or sequence_chunk to null")
        self.loss: dict[str, Any] = {str(key): value for key, value in loss.items()}

    @staticmethod
    def _check_loss(loss: Mapping[str, Any]) -> None:
        kl, ce = loss.get("kl_weight", 1.0), loss.get("ce_weight", 0.0)
        if min(kl, ce) < 0 or kl + ce == 0:
            raise UserError(f"loss.kl_weight {kl} and loss.ce_weight {ce}: none may be negative, one must be above 0")
        for key in ("temperature", "chunk_tokens"):
            if loss.get(key, 1) <= 0:
                raise UserError(f"loss.{key} {loss[key]} must be above 0")
        kind = loss.get("divergence", "forward")
        for key, its in (("skew", "skewed"), ("beta", "js")):
            if key in loss and kind != its:
                raise UserError(f"loss.{key} {loss[key]} belongs to loss.divergence {its}, not {kind}; leave it out")
        try:
            check_divergence(kind, loss.get("skew", 0.1), loss.get("beta", 0.5))
        except ValueError as e:
            raise UserError(f"loss.{e}") from e

    def _check_fp8(self) -> None:
        found = torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else None
        if found is None or found < (8, 9):
            here = self.cfg.device if found is None else f"compute capability {found[0]}.{found[1]}"
            raise UserError(f"fp8 needs a GPU of compute capability 8.9 or more, this is {here}; set fp8=False")
        if self.dtype != torch.bfloat16:
            raise UserError(f"fp8 goes with dtype=bf16, not {self.cfg.dtype}")

    def _every(self) -> Any:
        """Of how many layers one is computed again in the backward pass, where that is enabled."""
        return self.cfg.get("activation_checkpoint_every", 1)

    def build(self, student: HybridMambaForCausalLM, teacher: HybridMambaForCausalLM, mesh: DeviceMesh) -> None:
        reach = max((m.config.reach for m in (student, teacher) if m.config.mixer_layers), default=1)
        if self.chunk is not None and self.chunk < reach:
            raise UserError(
                f"sequence_chunk {self.chunk} must be at least {reach}: a mixer looks back on so many tokens"
            )
        compute = bool(self.cfg.get("compile"))
        if self.cfg.get("fp8"):
            compute_in_fp8(student, pad=any(self.cfg.batch_size * n % 16 for n in self._lengths(student.config.reach)))
        self.student, self.teacher = Student(student), Teacher(teacher)
        shard(
            self.student, mesh, self.dtype,
            masters=True,
            compute_layers=compute,
            checkpoint_activations=self._every() if self.cfg.get("enable_activation_checkpointing") else 0,
        )  # fmt: skip
        shard(self.teacher, mesh, self.dtype, compute_layers=compute, offload=self.offload)

        self.streams = None
        if self.layers_every:
            self.streams = Streams(self.student.model, self.teacher.model)
            self.measured = (*type(self).measured, *self.streams.names)

    def _lengths(self, reach: int) -> set[int]:
        """Of the pieces of a row that a layer sees at once; before a chunk a mixer sees `reach` tokens again."""
        length = self.data.length
        if self.chunk is None or self.chunk >= length:
            return {length}
        chunks = {self.chunk, length % self.chunk or self.chunk}
        return chunks | {n + reach for n in chunks}

    def setup(self, **more: Any) -> None:
        super().setup(**more)
        node, self.samples = self.cfg.get("samples"), None
        if node is not None:
            limit = self.student.model.config.max_position_embeddings
            self.samples = Samples(node, load_tokenizer(self.cfg.student), limit)
            if self.rank == 0:
                self.samples.rewind(self.cfg.output_dir, self.step)

    def after_step(self) -> None:
        if self.samples is None or self.step % self.samples.every:
            return
        assert isinstance(self.student, Student)
        self.read_metrics()
        answers = self.samples.answers(self.student, self.device)
        if self.rank == 0:
            self.samples.write(self.cfg.output_dir, self.step, answers, self.loggers)
        self._read_at = time.perf_counter()  # no part of training's speed

    def flops(self) -> float:
        frozen = self.frozen()
        return distillation_flops(
            self.student.model.config, self.teacher.model.config, self.data.length, lambda part: part not in frozen
        )

    def learn(self, batch: Batch, counted: int) -> Tensor:
        if self.chunk is None or self.chunk >= batch.tokens.shape[1]:
            return self._learn(batch, counted, None, None)
        sums, theirs, mine = torch.zeros(len(self.measured), device=self.device), Carry(), Carry()
        for chunk in batch.chunks(self.chunk):
            sums += self._learn(chunk, counted, theirs, mine)
            assert isinstance(chunk.documents, Tensor)
            theirs, mine = theirs.following(chunk.documents), mine.following(chunk.documents)
        return sums

    def _learn(self, batch: Batch, counted: int, theirs: Carry | None, mine: Carry | None) -> Tensor:
        looked = self.streams is not None and (self.step + 1) % self.layers_every == 0
        watch: Any = self.streams.watch(batch.labels) if self.streams is not None and looked else nullcontext([])
        with watch as errors:
            with torch.no_grad():
                teach = functools.partial(self.teacher, batch.tokens, batch.documents, theirs)
                # what is watched or carried on is more than what is returned: all on one stream
                target = teach() if looked or theirs is not None else self.side(teach)
            losses = self.student(*batch, target, mine, **self.loss)
        (losses.loss / counted).backward()
        sums = [v.detach().float() for v in losses[:4]]
        if self.streams is not None and not looked:
            errors = [torch.full_like(sums[0], math.nan) for _ in self.streams.names]
        return torch.stack(sums + errors)


@command
def main(cfg: DictConfig) -> int:
    """Distil a hybrid: tune run [--nproc_per_node N] distill_hybrid --config FILE [key=value ...]"""
    return run(cfg)


def run(cfg: DictConfig) -> int:
    """The recipe; see `recipe.run`."""
    return run_recipe(DistillHybrid, cfg)
