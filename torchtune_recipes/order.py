"""Which rows a process sees in which step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mamba_hybrid.errors import UserError


class RowOrder:
    """Rows shuffled anew in every epoch, dealt to processes so that the global batch does not depend on their number.

    A micro-batch is `processes` x `batch_size` consecutive rows of the shuffled order, a step `accumulation`
    micro-batches. Rows that do not fill a step at an epoch's end are left out of that epoch (other ones each time).
    Everything follows from the seed and the step's number: resuming needs no more.

    Args:
        rows: how many there are.
        batch_size: rows of one process in one micro-batch.
        accumulation: micro-batches of a step.
        seed: of the shuffling.
        rank, processes: which process this is, of how many.

    Raises:
        UserError: fewer rows than a step needs.
    """

    def __init__(
        self, rows: int, batch_size: int, accumulation: int, seed: int, rank: int = 0, processes: int = 1
    ) -> None:
        self.rows, self.batch_size, self.accumulation, self.seed = rows, batch_size, accumulation, seed
        self.rank, self.processes = rank, processes
        self._epoch, self._order = -1, np.empty(0, np.int64)
        if not self.steps_per_epoch:
            raise UserError(
                f"the data set has {rows} packed rows, a step takes {self.rows_per_step} (batch_size {batch_size} x "
                f"{processes} processes x gradient_accumulation_steps {accumulation}); lower one of these"
            )

    @property
    def rows_per_step(self) -> int:
        """Rows of all processes and micro-batches of a step."""
        return self.batch_size * self.processes * self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps of an epoch."""
        return self.rows // self.rows_per_step

    def step_rows(self, step: int) -> np.ndarray:
        """Row numbers of all processes in a step (accumulation, processes, batch_size)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        rows = self._order[within * self.rows_per_step : (within + 1) * self.rows_per_step]
        return rows.reshape(self.accumulation, self.processes, self.batch_size)

    def micro_batches(self, step: int) -> Iterator[np.ndarray]:
        """Row numbers (batch_size,) of this process's micro-batches in a step."""
        yield from self.step_rows(step)[:, self.rank]
