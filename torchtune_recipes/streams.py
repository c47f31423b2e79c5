"""How far the student's residual stream is from the teacher's after each quarter of the layers.

Shapes: B rows, L tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mamba_hybrid import HybridMambaForCausalLM
from mamba_hybrid.errors import UserError
from mamba_hybrid.loss import IGNORED

from .models import relative_error


class Streams:
    """Watches both models' layers during a forward pass.

    Args:
        student, teacher: of one width and depth, sharded or not.

    Raises:
        UserError: they are not.
    """

    def __init__(self, student: HybridMambaForCausalLM, teacher: HybridMambaForCausalLM) -> None:
        for name in ("hidden_size", "num_hidden_layers"):
            mine, theirs = getattr(student.config, name), getattr(teacher.config, name)
            if mine != theirs:
                raise UserError(
                    f"log_layers_every compares layer by layer, but {name} of the student is {mine}, of the teacher "
                    f"{theirs}; set it to null"
                )
        n = student.config.num_hidden_layers
        self.layers = sorted({max(n * quarter // 4 - 1, 0) for quarter in (1, 2, 3, 4)})
        self.student, self.teacher = student, teacher

    @property
    def names(self) -> list[str]:
        """Names of what is measured."""
        return [f"residual_error_layer_{i}" for i in self.layers]

    @contextmanager
    def watch(self, labels_BL: Tensor) -> Iterator[list[Tensor]]:
        """Fills the list with scalars as a forward pass of the teacher and then of the student goes on under it.

        Each is the squared error of the stream relative to the square of the teacher's, both means over a row's
        labelled tokens, summed over rows with their number of labels as weights.
        """
        counted_BL = labels_BL != IGNORED
        weight_B = counted_BL.sum(1).float()
        theirs: dict[int, Tensor] = {}
        errors: list[Tensor] = []

        def keep(layer: int, h_BLD: Tensor) -> None:
            theirs[layer] = h_BLD.detach()

        @torch.no_grad()
        def compare(layer: int, h_BLD: Tensor) -> None:
            errors.append((relative_error(h_BLD.detach(), theirs.pop(layer), counted_BL) * weight_B).sum())

        # on the outermost module of a layer, which activation checkpointing does not run again
        hooks = [
            model.get_submodule(f"model.layers.{i}").register_forward_hook(
                lambda _, inputs, output, layer=i, note=note: note(layer, output)
            )
            for model, note in ((self.teacher, keep), (self.student, compare))
            for i in self.layers
        ]
        try:
            yield errors
        finally:
            for hook in hooks:
                hook.remove()
