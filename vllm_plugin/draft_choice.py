"""How many tokens to draft, by what steps with more drafts, fewer and none have brought.

A draft costs a step of the draft model and a row of the verify step; what it brings depends on the text, the batch and
the machine. So all ways are run and timed: for each size of batch, up to the next power of two, some steps with all
drafts, with half of them and with none. The way with most tokens a second of a sequence is kept for a while, then
another is tried.
"""

from __future__ import annotations

from collections import deque
from statistics import fmean, median
from typing import TYPE_CHECKING

from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

logger = init_logger("vllm.mamba_hybrid")

# steps of a trial: rows enough that the number of accepted drafts is known to some percent
TRIAL_STEPS, TRIAL_ROWS = 8, 128
# a trial of that many steps, and TRIAL_ROWS rows, ends if its rate is below that share of the best's
GLANCE, HOPELESS = 3, 0.8
KEPT, LONGEST = 8, 64  # trials' steps for which the best way is kept: at first, and after trials that change nothing
PATIENCE = 8  # trials' steps that may pass uncounted before a trial is given up


def choices(drafts: int) -> list[int]:
    """The numbers of drafts to choose from.

    Example:
        >>> choices(4)
        [4, 2, 0]
    """
    return sorted({drafts, (drafts + 1) // 2, 0}, reverse=True)


class Way:
    """What the last steps brought.

    Args:
        steps: how many.
    """

    def __init__(self, steps: int) -> None:
        self.tokens: deque[float] = deque(maxlen=steps)
        self.seconds: deque[float] = deque(maxlen=steps)
        self.rate = 0.0  # a sequence's tokens a second, 0 before the first step

    def add(self, tokens: float, seconds: float) -> None:
        """A step, with so many tokens of each sequence in the mean."""
        self.tokens.append(tokens)
        self.seconds.append(seconds)
        # the median, since a hiccup of the machine says nothing about drafts
        self.rate = fmean(self.tokens) / median(self.seconds)


class Size:
    """What is known of a size of batch.

    Args:
        most: sequences of its largest batch.
        drafts: tokens that are drafted at most.
    """

    def __init__(self, most: int, drafts: int) -> None:
        self.most = most
        self.trial = max(TRIAL_STEPS, TRIAL_ROWS // most)
        self.glance = max(GLANCE, TRIAL_ROWS // (most // 2 + 1))  # a batch of this size has more than half of `most`
        self.ways = {n: Way(self.trial) for n in choices(drafts)}
        self.drafts = self.best = drafts
        self.trying, self.left, self.turn, self.uncounted, self.kept = True, self.trial, 0, 0, KEPT

    def add(self, drafts: int, tokens: float, seconds: float) -> None:
        """A step of this size, with so many tokens of each sequence in the mean."""
        self.ways[drafts].add(tokens, seconds)
        if drafts != self.drafts:  # was scheduled before the last decision
            return
        self.uncounted = 0
        self.left -= 1
        if self.trying:
            if self.left <= 0 or self._hopeless():
                self._conclude()
            return
        others = sorted((n for n in self.ways if n != self.best), key=lambda n: self.ways[n].rate)
        if self.ways[others[-1]].rate > self.ways[self.best].rate:  # the best has become worse
            self._try(others[-1])
        elif self.left <= 0:
            self.turn += 1
            self._try(others[self.turn % len(others)])

    def skip(self) -> None:
        """A step of this size that tells nothing. Where nearly all are such, a trial would never end."""
        self.uncounted += 1
        if self.trying and self.uncounted > PATIENCE * self.trial:
            if self.drafts != self.best:
                self.ways[self.drafts] = Way(self.trial)  # some steps of a trial are no measurement
            self._keep()

    def _hopeless(self) -> bool:
        """Large batches show soon that a way is much worse, and cost most until its trial has ended."""
        way, best = self.ways[self.drafts], self.ways[self.best]
        return len(way.tokens) >= self.glance and way.rate < HOPELESS * best.rate

    def _try(self, drafts: int) -> None:
        self.drafts, self.trying, self.left, self.uncounted = drafts, True, self.trial, 0
        self.ways[drafts] = Way(self.trial)

    def _conclude(self) -> None:
        if unknown := [n for n, way in self.ways.items() if not way.rate]:
            self._try(unknown[0])
            return
        best = max(self.ways, key=lambda n: self.ways[n].rate)
        if best != self.best:
            rates = ", ".join(f"{way.rate:.1f} with {n} drafts" for n, way in self.ways.items())
            logger.info("Up to %d sequences at once: tokens/s of each are %s; %d from now on.", self.most, rates, best)
        self.kept = KEPT if best != self.best else min(2 * self.kept, LONGEST)
        self.best = best
        self._keep()

    def _keep(self) -> None:
        self.drafts, self.trying, self.left = self.best, False, self.kept * self.trial


class DraftChoice:
    """Stands where vLLM's scheduler looks up how many tokens to draft, by the number of sequences.

    Args:
        drafts: tokens that are drafted at most.

    Example:
        >>> DraftChoice(4)[3]
        4
    """

    def __init__(self, drafts: int) -> None:
        self.drafts = drafts
        self.sizes: dict[int, Size] = {}
        self.begun: dict[int, float] = {}  # of steps on their way
        self.last = 0.0  # when the last step had ended
        self.read = False  # whether the last step read a prompt

    def _size(self, sequences: int) -> Size:
        most = 1 << (sequences - 1).bit_length()
        if most not in self.sizes:
            self.sizes[most] = Size(most, self.drafts)
        return self.sizes[most]

    def __getitem__(self, sequences: int) -> int:
        """Tokens to draft for each of so many sequences."""
        return self._size(sequences).drafts

    def begin(self, step: SchedulerOutput, now: float) -> None:
        """A step was scheduled, begun at that second."""
        self.begun[id(step)] = now

    def end(self, step: SchedulerOutput, tokens: int, now: float) -> None:
        """Its tokens, of all sequences, are there. Counted are steps that verified as many drafts of each sequence as
        they made, and read no prompt, nor did the step before: its draft round is paid by the next."""
        # the step before may still have run when this one was scheduled
        seconds = now - max(self.begun.pop(id(step)), self.last)
        self.last = now
        rows, drafts = len(step.num_scheduled_tokens), step.num_spec_tokens_to_schedule
        if not rows:
            return
        read_before, scheduled = self.read, step.total_num_scheduled_tokens
        decoded = rows + sum(map(len, step.scheduled_spec_decode_tokens.values()))
        self.read = bool(step.scheduled_new_reqs) or scheduled != decoded
        if self.read or read_before or scheduled != rows * (drafts + 1):
            self._size(rows).skip()
        else:
            self._size(rows).add(drafts, tokens / rows, seconds)
