"""The rows (sequences) of a ragged step.

Shapes: R rows, M tokens of the step, padding included.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass
class StepRows:
    """Which sequence stands where in a step, and in which slot. What a kernel reads lies on the device, so that a CUDA
    graph can hold it; what decides about launches lies on the host.

    Args:
        slot_R: int32, slot of each row, no slot twice; negative for padding, whose tokens no one looks at.
        start_R: int32, position of each row's first token. It may be smaller than in the step before, by up to
            layout.rewind from that step's end; 0 starts a sequence and ignores what the slot holds.
        first_R1: int32 (R + 1), where each row's tokens begin among the M; tokens from first_R1[-1] on are padding.
        lengths: tokens of each row. Up to layout.step they are a decode or verify step (any of them may be taken back
            later), above that a prefill; 0 is padding. Only the reference needs them exact: the kernels take those of
            rows up to layout.step from first_R1, which a step may have cut on the device.
        most: tokens of the longest row, or more. A CUDA graph that was captured with it serves rows up to it,
            whatever `lengths` said then.

    Example:
        >>> StepRows.of([2, 0], [0, 40], [3, 1]).first_R1.tolist()
        [0, 3, 4]
    """

    slot_R: Tensor
    start_R: Tensor
    first_R1: Tensor
    lengths: list[int]
    most: int

    @classmethod
    def of(
        cls, slots: list[int], starts: list[int], lengths: list[int], device: torch.device | str = "cpu"
    ) -> StepRows:
        """From numbers on the host."""

        def on_device(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        first_R1 = on_device([0, *accumulate(lengths)])
        return cls(on_device(slots), on_device(starts), first_R1, lengths, max(lengths, default=0))

    @property
    def live(self) -> Tensor:
        """(1,) how many tokens are no padding."""
        return self.first_R1[-1:]

    def on_host(self) -> list[tuple[int, int, int, int]]:
        """(slot, start, first token, tokens) of each row that is no padding."""
        columns = (self.slot_R.tolist(), self.start_R.tolist(), self.first_R1.tolist(), self.lengths)
        return [row for row in zip(*columns, strict=False) if row[0] >= 0 and row[3]]

    def positions(self, tokens: int) -> Tensor:
        """(M,) int64, position of each token in its sequence, of padding anything."""
        token_M = torch.arange(tokens, dtype=torch.int32, device=self.first_R1.device)
        row_M = torch.searchsorted(self.first_R1[1:-1].contiguous(), token_M, right=True)
        return (self.start_R[row_M] + token_M - self.first_R1[row_M]).long()
