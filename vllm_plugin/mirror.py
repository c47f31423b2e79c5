"""Where each sequence's checkpoint stands, told from the scheduler's numbers without a look at the device.

A slot's checkpoint position follows from where its sequence's steps began and how long they were
(`mamba_hybrid_kernels/slot.py`), for prompts and drafts alike. So the same rule on the host, fed with the same steps,
has the same position. Where a sequence begins from the prefix cache, its slot is a copy of one whose position was
known when the copy was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mamba_hybrid_kernels import SlotLayout


@dataclass
class StepCounts:
    """What one step did to the states.

    Args:
        replayed: of each row of a decode or verify step, the tokens between its checkpoint and the newest token that
            its state answers for.
        decode_flushes: rows of a decode or verify step whose state was written.
        prefill_flushes: the same of longer rows.
    """

    replayed: list[int]
    decode_flushes: int = 0
    prefill_flushes: int = 0


class SlotMirror:
    """Checkpoint positions of the sequences that run.

    Args:
        layout: the slots' layout.
        block_size: tokens of a block of the prefix cache, None without one.

    Example:
        >>> mirror = SlotMirror(SlotLayout(1, 1, 1, 32, 32, window=16))
        >>> mirror.begin("a", 0)
        >>> mirror.step({"a": 100})
        StepCounts(replayed=[], decode_flushes=0, prefill_flushes=1)
        >>> mirror.step({"a": 1})
        StepCounts(replayed=[1], decode_flushes=0, prefill_flushes=0)
    """

    def __init__(self, layout: SlotLayout, block_size: int | None = None) -> None:
        self.layout, self.block_size = layout, block_size
        self.rows: dict[str, list[int]] = {}  # position and checkpoint
        self.blocks: dict[str, list[int]] = {}
        self.snapshots: dict[int, int] = {}  # block -> checkpoint of the slot that was left in it

    def begin(self, name: str, start: int, blocks: Sequence[int] = ()) -> None:
        """A sequence starts, or starts again after it was preempted.

        Args:
            name: the sequence's.
            start: its first step's position, above 0 what came out of the prefix cache. A sequence whose checkpoint
                cannot be known (a state that came from elsewhere) is left out of all counts.
            blocks: its blocks so far, 0 where it has none.
        """
        self.end(name)
        checkpoint: int | None = 0
        if start:
            checkpoint = None
            if self.block_size and start % self.block_size == 0 and start // self.block_size <= len(blocks):
                checkpoint = self.snapshots.get(blocks[start // self.block_size - 1])
        if checkpoint is None:
            return
        self.rows[name] = [start, checkpoint]
        if self.block_size:
            self.blocks[name] = list(blocks)

    def extend(self, name: str, blocks: Sequence[int]) -> None:
        """A sequence gets more blocks."""
        if name in self.blocks:
            self.blocks[name].extend(blocks)

    def end(self, name: str) -> None:
        """A sequence is over; one that never began is passed over."""
        self.rows.pop(name, None)
        self.blocks.pop(name, None)

    def step(self, tokens: dict[str, int], rejected: dict[str, int] | None = None) -> StepCounts:
        """One step of the engine.

        Args:
            tokens: sequence -> its tokens in the step, drafts included.
            rejected: sequence -> how many of them were taken back.

        Returns:
            Replay lengths and flushes of the sequences that are known.
        """
        layout, known, back = self.layout, self.rows, rejected or {}
        most, window, room = layout.step, layout.window, layout.ring - layout.step
        behind = layout.rewind + window
        counts = StepCounts([])
        replayed = counts.replayed
        for name, T in tokens.items():
            row = known.get(name)
            if row is None:
                continue
            start, checkpoint = row
            end = start + T
            short = most >= T
            if short:
                far = end - window - checkpoint
                replayed.append(far if far > 0 else 0)
            if end - checkpoint > room:
                row[1] = end - behind
                if short:
                    counts.decode_flushes += 1
                else:
                    counts.prefill_flushes += 1
            row[0] = end - back[name] if name in back else end
            if self.block_size and row[0] // self.block_size > start // self.block_size:
                self._leave(name, row)
        return counts

    def _leave(self, name: str, row: list[int]) -> None:
        """The engine keeps the slot of a sequence that has come to a block's end, or a copy of it, in that block."""
        assert self.block_size
        column, blocks = row[0] // self.block_size - 1, self.blocks[name]
        if column < len(blocks) and blocks[column]:
            self.snapshots[blocks[column]] = row[1]
