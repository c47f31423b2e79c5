"""Whether to draft, by what steps with drafts and without have brought.

A draft costs a step of the draft model and a row of the verify step; what it brings depends on the text, the batch and
the machine. So both ways are run and timed: for each size of batch, up to the next power of two, some steps with drafts
and some without. The way with more tokens a second is kept for a while, then the other one is tried again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

logger = init_logger("vllm.mamba_hybrid")

# steps of a trial: rows enough that the number of accepted drafts is known to some percent
TRIAL_STEPS, TRIAL_ROWS = 8, 128
KEPT = 16  # trials' time for which the better way is kept


@dataclass
class Way:
    """Tokens and seconds of the last steps, older ones faded."""

    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float, keep: float) -> None:
        self.tokens = self.tokens * keep + tokens
        self.seconds = self.seconds * keep + seconds

    @property
    def rate(self) -> float:
        """Tokens a second, 0 before the first step."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Size:
    """What is known of a size of batch.

    Args:
        most: sequences of its largest batch.
    """

    most: int
    drafting: bool = True
    trying: bool = True
    better: bool = True
    ways: dict[bool, Way] = field(default_factory=lambda: {True: Way(), False: Way()})

    def __post_init__(self) -> None:
        self.trial = max(TRIAL_STEPS, TRIAL_ROWS // self.most)
        self.left = self.trial

    def add(self, drafted: bool, tokens: int, seconds: float) -> None:
        """A step of this size."""
        self.ways[drafted].add(tokens, seconds, 1 - 1 / self.trial)
        if drafted != self.drafting:  # was scheduled before the last decision
            return
        self.left -= 1
        if self.left == 0:
            if self.trying and self.ways[not drafted].rate:
                self._decide()
            else:
                self._go(drafting=not drafted, trying=True)

    def _go(self, *, drafting: bool, trying: bool) -> None:
        self.drafting, self.trying = drafting, trying
        self.left = self.trial * (1 if trying else KEPT)
        if trying:
            self.ways[drafting] = Way()

    def _decide(self) -> None:
        with_drafts, without = self.ways[True].rate, self.ways[False].rate
        better = with_drafts >= without
        if better != self.better:
            logger.info(
                "Up to %d sequences at once: %.0f tokens/s with drafts, %.0f without, so drafts are %s.",
                self.most, with_drafts, without, "on" if better else "off",
            )  # fmt: skip
        self.better = better
        self._go(drafting=better, trying=False)


class DraftChoice:
    """Stands where vLLM's scheduler looks up how many tokens to draft, by the number of sequences.

    Args:
        drafts: tokens that are drafted if any are.
        clock: seconds.

    Example:
        >>> DraftChoice(4)[3]
        4
    """

    def __init__(self, drafts: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.drafts, self.clock = drafts, clock
        self.sizes: dict[int, Size] = {}
        self.begun: dict[int, float] = {}  # of steps on their way
        self.last = clock()

    def _size(self, sequences: int) -> Size:
        most = 1 << (sequences - 1).bit_length()
        return self.sizes.setdefault(most, Size(most))

    def __getitem__(self, sequences: int) -> int:
        """Tokens to draft for each of so many sequences."""
        return self.drafts if self._size(sequences).drafting else 0

    def begin(self, step: SchedulerOutput) -> None:
        """A step has been scheduled."""
        self.begun[id(step)] = self.clock()

    def end(self, step: SchedulerOutput, tokens: int) -> None:
        """Its tokens, of all sequences, are there. Counted are steps that did nothing but decode, and that verified as
        many drafts as they made."""
        now = self.clock()
        # the step before may still have run when this one was scheduled
        seconds = now - max(self.begun.pop(id(step)), self.last)
        self.last = now
        rows, drafts = len(step.num_scheduled_tokens), step.num_spec_tokens_to_schedule
        if rows and not step.scheduled_new_reqs and step.total_num_scheduled_tokens == rows * (drafts + 1):
            self._size(rows).add(drafts > 0, tokens, seconds)
