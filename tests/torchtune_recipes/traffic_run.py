"""What each recipe's second step moves between two processes.

    python -m tests.torchtune_recipes.traffic_run CONFIG.yaml:RECIPE ...

Beside CONFIG.yaml comes CONFIG.json: rows of the first process's collectives, with the bytes of their first two
arguments.
"""

import json
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode

from torchtune_recipes.stages import STAGES

from .forked_run import each


class Collectives(TorchDispatchMode):
    """Notes the collectives on tensors of more than a number."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            sizes = [torch.utils._pytree.tree_leaves(a) for a in args[:2]]
            first, second = (sum(t.nbytes for t in s if isinstance(t, torch.Tensor)) for s in sizes)
            self.rows.append((func.name(), first, second))
        return func(*args, **(kwargs or {}))


def run(out: Path, file: str, name: str) -> None:
    recipe = STAGES[name].recipe(OmegaConf.load(file))
    recipe.setup()
    try:
        recipe.train_step()
        recipe.step += 1
        with Collectives() as seen:
            recipe.train_step()
    finally:
        recipe.cleanup()
    if recipe.rank == 0:
        out.write_text(json.dumps(seen.rows))


if __name__ == "__main__":
    for word in sys.argv[1:]:
        file, name = word.split(":")
        if each(2, lambda file=file, name=name: run(Path(file).with_suffix(".json"), file, name)):
            sys.exit(f"{name} failed")
