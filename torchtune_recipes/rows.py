"""What data sets in memory share: rows of one length, whose order follows from the seed and the step alone.

Shapes: R rows, L tokens of a row.
"""

from __future__ import annotations

import hashlib

import numpy as np

from mamba_hybrid.errors import UserError

from .order import RowOrder


class Rows:
    """Rows in memory.

    Attributes:
        tokens_RL: int32 token numbers.
        documents_RL: int32 numbers 0, 1, ... of the documents within each row.
        counted_RL: bool, positions whose next token is learnt.
        valid_R: what each row adds to the number that a step's loss is divided by.
    """

    tokens_RL: np.ndarray
    documents_RL: np.ndarray
    counted_RL: np.ndarray
    valid_R: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens_RL)

    @property
    def length(self) -> int:
        """L."""
        return self.tokens_RL.shape[1]

    def check_vocabulary(self, size: int) -> None:
        """Raises UserError for a token that a vocabulary of this size does not have."""
        if (largest := int(self.tokens_RL.max())) >= size:
            raise UserError(f"the tokenizer of the student makes token {largest}, the model has {size}")

    def order(self, batch_size: int, accumulation: int, seed: int, rank: int = 0, processes: int = 1) -> RowOrder:
        """The order in which a run sees the rows."""
        return RowOrder(len(self), batch_size, accumulation, seed, rank, processes)

    def valid(self, rows: np.ndarray) -> int:
        """Sum of `valid_R` over the rows of these numbers."""
        return int(self.valid_R[rows].sum())

    def place(self, rows: int) -> None:
        """What resuming behind so many rows needs beside their number: nothing."""

    def resume(self, rows: int, place: None) -> None:
        """Go on behind so many rows: nothing to do."""

    def digest(self) -> str:
        """Fingerprint of what the rows hold."""
        h = hashlib.sha256(str(self.tokens_RL.shape).encode())
        for array in (self.tokens_RL, self.documents_RL, self.counted_RL):
            h.update(array.tobytes())
        return h.hexdigest()[:16]
