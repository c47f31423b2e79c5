"""Training checkpoints: step_N directories that are whole or not there.

A step_N holds the sharded model and optimiser (torch.distributed.checkpoint), and recipe_state.json with the step
and what must be the same on resumption. It is written under a hidden name, by all processes, and takes its own from the
first of them when everything is on the disk.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from mamba_hybrid.errors import UserError
from mamba_hybrid.output import to_disk

STATE = "recipe_state.json"


class Checkpoints:
    """The step_N directories of a run. All processes call its methods together, but for `steps` and `sweep`.

    Args:
        directory: of the run.
        keep: how many to keep, 0 for all.
        background: write while training goes on, from a copy in host memory.
    """

    def __init__(self, directory: str | Path, keep: int, *, background: bool = False) -> None:
        self.directory, self.keep, self.background = Path(directory), keep, background
        # not the default group: its collectives would meet those of training, from another thread
        self._group = dist.new_group(backend="gloo")
        self._first = dist.get_rank() == 0
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[Path, Future[None]] | None = None

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        found = (p.parent.name.removeprefix("step_") for p in self.directory.glob(f"step_*/{STATE}"))
        return sorted(int(name) for name in found if name.isdecimal())

    def state(self, step: int) -> dict[str, Any]:
        """What `save` was given beside model and optimiser."""
        return json.loads((self.directory / f"step_{step}" / STATE).read_text())

    def sweep(self) -> None:
        """Remove what a killed run left half-written, checkpoints and result; for one process, before any saves."""
        for pattern in (".step_*", ".hybrid.*"):
            for entry in self.directory.glob(pattern):
                shutil.rmtree(entry, ignore_errors=True)

    def save(self, step: int, model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Write step_N, or begin to in the background, where one save waits for the one before.

        Raises:
            UserError: this checkpoint, or the one before in the background, cannot be written.
        """
        self.wait()
        work, final = self.directory / f".step_{step}", self.directory / f"step_{step}"
        if self._first:
            shutil.rmtree(work, ignore_errors=True)
            try:
                work.mkdir(parents=True)
            except OSError as e:
                raise UserError(f"output_dir {self.directory} cannot be written: {e.strerror}") from e
        dist.barrier(self._group)
        weights, moments = get_state_dict(model, optimizer)
        whole = {"model": weights, "optimizer": moments}
        if self.background:
            written = dcp.async_save(whole, checkpoint_id=work, process_group=self._group)
            assert isinstance(written, Future)  # the other kind is of stagers that are not asked for
        else:
            written = Future()
            try:
                written.set_result(dcp.save(whole, checkpoint_id=work, process_group=self._group))
            except CheckpointException as e:
                written.set_exception(e)
        self._pending = final, self._thread.submit(self._finish, written, work, final, {"step": step, **state})
        if not self.background:
            self.wait()

    def _finish(self, written: Future[Any], work: Path, final: Path, state: dict[str, Any]) -> None:
        """On the first process, when all have written theirs: name the checkpoint, and remove old ones."""
        try:
            written.result()
            if not self._first:
                return
            (work / STATE).write_text(json.dumps(state))
            for path in (*work.iterdir(), work):
                to_disk(path)
            if final.exists():
                self._remove(final)
            work.rename(final)
            to_disk(self.directory)
            for old in self.steps()[: -self.keep] if self.keep else []:
                self._remove(self.directory / f"step_{old}")
        except BaseException:
            if self._first:
                shutil.rmtree(work, ignore_errors=True)
            raise

    @staticmethod
    def _remove(checkpoint: Path) -> None:
        """Under a hidden name first: a half one never stands under its own."""
        gone = checkpoint.with_name(f".{checkpoint.name}.old")
        checkpoint.rename(gone)
        shutil.rmtree(gone)

    def wait(self) -> None:
        """Until the save under way, if there is one, is whole.

        Raises:
            UserError: it has failed.
        """
        if self._pending is None:
            return
        (path, done), self._pending = self._pending, None
        failed: list[str | None] = [None]
        try:
            done.result()
        except (Exception, CheckpointException) as e:  # the latter is no Exception
            failed = [_reason(e)]
        dist.broadcast_object_list(failed, group=self._group)  # what the first process knows holds for all
        if failed[0] is not None:
            kept = self.steps()
            raise UserError(
                f"checkpoint {path} cannot be written ({failed[0]}); make room in output_dir and run again: "
                + (f"it goes on after step {kept[-1]}" if kept else "it starts anew")
            )

    def close(self) -> None:
        """Let a save under way come to its end when the run ends with an error of its own."""
        if self._pending is not None:
            self._pending[1].exception()
        self._thread.shutdown()

    def load_latest(self, model: nn.Module, optimizer: Optimizer, expected: dict[str, Any]) -> int:
        """Fill model and optimiser from the newest checkpoint.

        Args:
            expected: settings that must be those of the run that wrote it.

        Returns:
            Its step, 0 if there is none.

        Raises:
            UserError: it is of a run with other settings, or cannot be read.
        """
        newest = [max(self.steps(), default=0)]
        dist.broadcast_object_list(newest, group=self._group)  # on a shared file system not all see the same at once
        if not newest[0]:
            return 0
        path = self.directory / f"step_{newest[0]}"
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
            dcp.load(loaded, checkpoint_id=path, process_group=self._group)
            set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        except UserError:
            raise
        except (Exception, CheckpointException) as e:  # the latter is no Exception; damage shows in many ways
            raise UserError(
                f"checkpoint {path} is damaged ({_reason(e)}); remove it to resume from the one before"
            ) from e
        return int(state["step"])


def _reason(e: BaseException) -> str:
    """The last line of an error, which is its cause where several processes' are put together."""
    return (str(e).strip() or type(e).__name__).splitlines()[-1]
