"""Which rows a process sees in which step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from mamba_hybrid.errors import UserError


class Order:
    """Rows dealt to processes so that the global batch does not depend on their number.

    A micro-batch is `processes` x `batch_size` consecutive rows of a shuffled order, a step `accumulation`
    micro-batches. Everything follows from the seed and the step's number.

    Args:
        batch_size: rows of one process in one micro-batch.
        accumulation: micro-batches of a step.
        seed: of the shuffling.
        rank, processes: which process this is, of how many.
    """

    steps_per_epoch: int | None

    def __init__(self, batch_size: int, accumulation: int, seed: int, rank: int, processes: int) -> None:
        self.batch_size, self.accumulation, self.seed = batch_size, accumulation, seed
        self.rank, self.processes = rank, processes

    @property
    def rows_per_step(self) -> int:
        """Rows of all processes and micro-batches of a step."""
        return self.batch_size * self.processes * self.accumulation

    def steps(self, max_steps: int | None, epochs: int | None) -> int:
        """How many a run makes.

        Raises:
            UserError: these do not say.
        """
        raise NotImplementedError

    def epoch(self, step: int) -> int:
        """How often all data were seen before a step."""
        raise NotImplementedError

    def _shuffled(self, step: int) -> np.ndarray:
        """Row numbers of a step (rows_per_step,)."""
        raise NotImplementedError

    def step_rows(self, step: int) -> np.ndarray:
        """Row numbers of all processes in a step (accumulation, processes, batch_size)."""
        return self._shuffled(step).reshape(self.accumulation, self.processes, self.batch_size)

    def micro_batches(self, step: int) -> Iterator[np.ndarray]:
        """Row numbers (batch_size,) of this process's micro-batches in a step."""
        yield from self.step_rows(step)[:, self.rank]


class RowOrder(Order):
    """A known number of rows, shuffled anew in every epoch.

    Rows that do not fill a step at an epoch's end are left out of that epoch (other ones each time). Resuming needs no
    more than the step.

    Args:
        rows: how many there are.
        batch_size, accumulation, seed, rank, processes: as `Order`.

    Raises:
        UserError: fewer rows than a step needs.
    """

    steps_per_epoch: int

    def __init__(
        self, rows: int, batch_size: int, accumulation: int, seed: int, rank: int = 0, processes: int = 1
    ) -> None:
        super().__init__(batch_size, accumulation, seed, rank, processes)
        self.rows, self.steps_per_epoch = rows, rows // self.rows_per_step
        self._epoch, self._order = -1, np.empty(0, np.int64)
        if not self.steps_per_epoch:
            raise UserError(
                f"the data set has {rows} packed rows, a step takes {self.rows_per_step} (batch_size {batch_size} x "
                f"{processes} processes x gradient_accumulation_steps {accumulation}); lower one of these"
            )

    def steps(self, max_steps: int | None, epochs: int | None) -> int:
        return min(n for n in (max_steps, epochs and epochs * self.steps_per_epoch) if n)

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def _shuffled(self, step: int) -> np.ndarray:
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        return self._order[within * self.rows_per_step : (within + 1) * self.rows_per_step]


class StreamOrder(Order):
    """The rows of a stream, shuffled within blocks of consecutive ones.

    A block and not a buffer that is refilled row by row, because resuming then needs no buffer's content: only where in
    the stream the block begins.

    Args:
        block: rows of a block.
        shuffle: whether to.
        passes: how often the stream had gone through its data before a row.
        batch_size, accumulation, seed, rank, processes: as `Order`.
    """

    steps_per_epoch = None

    def __init__(
        self,
        block: int,
        shuffle: bool,
        passes: Callable[[int], int],
        batch_size: int,
        accumulation: int,
        seed: int,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        super().__init__(batch_size, accumulation, seed, rank, processes)
        self.block, self.shuffle, self._passes = block, shuffle, passes
        self._number, self._order = -1, np.empty(0, np.int64)

    def steps(self, max_steps: int | None, epochs: int | None) -> int:
        if epochs is not None or max_steps is None:
            raise UserError(f"epochs {epochs} needs a data set of known length, a stream has none; set max_steps alone")
        return max_steps

    def epoch(self, step: int) -> int:
        return self._passes(step * self.rows_per_step)

    def _shuffled(self, step: int) -> np.ndarray:
        rows = np.arange(step * self.rows_per_step, (step + 1) * self.rows_per_step)
        return np.array([self._row(row) for row in rows.tolist()]) if self.shuffle else rows

    def _row(self, position: int) -> int:
        number, within = divmod(position, self.block)
        if number != self._number:
            self._number, self._order = number, np.random.default_rng([self.seed, number]).permutation(self.block)
        return number * self.block + int(self._order[within])
