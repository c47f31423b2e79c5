"""Training checkpoints: step_N directories that are whole or not there.

A step_N holds the sharded model and optimiser (torch.distributed.checkpoint), and recipe_state.json with the step
and what must be the same on resumption.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from mamba_hybrid.errors import UserError

STATE = "recipe_state.json"


class Checkpoints:
    """The step_N directories of a run.

    Args:
        directory: of the run.
        keep: how many to keep, 0 for all.
    """

    def __init__(self, directory: str | Path, keep: int) -> None:
        self.directory, self.keep = Path(directory), keep

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        found = (p.parent.name.removeprefix("step_") for p in self.directory.glob(f"step_*/{STATE}"))
        return sorted(int(name) for name in found if name.isdecimal())

    def state(self, step: int) -> dict[str, Any]:
        """What `save` was given beside model and optimiser."""
        return json.loads((self.directory / f"step_{step}" / STATE).read_text())

    def sweep(self) -> None:
        """Remove what a killed run left half-written; for one process, before any saves."""
        for entry in self.directory.glob(".step_*"):
            shutil.rmtree(entry, ignore_errors=True)

    def save(self, step: int, model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Write step_N: every rank its shards, into a hidden directory that then takes its name."""
        work, final = self.directory / f".step_{step}", self.directory / f"step_{step}"
        rank0 = dist.get_rank() == 0
        if rank0:
            shutil.rmtree(work, ignore_errors=True)
            try:
                work.mkdir(parents=True)
            except OSError as e:
                raise UserError(f"output_dir {self.directory} cannot be written: {e.strerror}") from e
        dist.barrier()
        weights, moments = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=work)
        dist.barrier()
        if rank0:
            (work / STATE).write_text(json.dumps({"step": step, **state}))
            for file in work.iterdir():
                with file.open("rb") as f:
                    os.fsync(f.fileno())
            shutil.rmtree(final, ignore_errors=True)
            work.rename(final)
            for old in self.steps()[: -self.keep] if self.keep else []:
                gone = self.directory / f".step_{old}"
                (self.directory / f"step_{old}").rename(gone)  # a half one never stands under its name
                shutil.rmtree(gone)
        dist.barrier()

    def load_latest(self, model: nn.Module, optimizer: Optimizer, expected: dict[str, Any]) -> int:
        """Fill model and optimiser from the newest checkpoint.

        Args:
            expected: settings that must be those of the run that wrote it.

        Returns:
            Its step, 0 if there is none.

        Raises:
            UserError: it is of a run with other settings, or cannot be read.
        """
        steps = self.steps()
        if not steps:
            return 0
        path = self.directory / f"step_{steps[-1]}"
        try:
            state = json.loads((path / STATE).read_text())
            for key, value in expected.items():
                if state.get(key) != value:
                    raise UserError(
                        f"{path} was written with {key} {state.get(key)}, this run has {value}; "
                        "set it back, or start anew with another output_dir"
                    )
            weights, moments = get_state_dict(model, optimizer)
            loaded: dict[str, Any] = {"model": weights, "optimizer": moments}
            dcp.load(loaded, checkpoint_id=path)
            set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        except UserError:
            raise
        except (Exception, CheckpointException) as e:  # the latter is no Exception; damage shows in many ways
            reason = (str(e).strip() or type(e).__name__).splitlines()[-1]
            raise UserError(f"checkpoint {path} is damaged ({reason}); remove it to resume from the one before") from e
        return int(state["step"])
