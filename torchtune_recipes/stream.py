"""Packed rows of data that do not fit into memory, made while they are used.

Shapes: B rows of one batch, L tokens of a row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from mamba_hybrid.errors import UserError

from .documents import Document, Documents
from .order import StreamOrder
from .packing import Batch, PackedRows

UNSHUFFLED = 64  # rows of a block that need not be shuffled


class StreamError(UserError):
    """Something is wrong with data that a running training has come to."""


class Block(NamedTuple):
    """Consecutive rows.

    Args:
        start, end: where in the documents they begin, and what follows them.
        rows: they themselves.
    """

    start: dict[str, Any]
    end: dict[str, Any]
    rows: PackedRows


class StreamedRows:
    """The rows that `PackedRows` would make of documents, a block at a time; after the last document comes the first.

    Every process reads the whole stream, so that all know a step's labels and there is nothing to exchange. The block
    after the newest is read by a thread, beside the training.

    Args:
        documents: what is packed.
        length: L, tokens of a row.
        shuffle_buffer: rows that are shuffled together, all in memory; 1 for the documents' own order.

    Raises:
        UserError: no tokens, no token to learn in the first block, or a length below 2; later a StreamError.
    """

    def __init__(self, documents: Documents, length: int, shuffle_buffer: int) -> None:
        self.length, self.shuffle = length, shuffle_buffer > 1
        self.size = shuffle_buffer if self.shuffle else UNSHUFFLED
        self._documents = documents
        self._thread = ThreadPoolExecutor(1)
        self._next: Future[Block]
        self._vocabulary: int | None = None
        self._blocks: dict[int, Block] = {}
        # of each block that was read, also when it is gone: labels of its rows, passes before it
        self._seen: dict[int, tuple[np.ndarray, int]] = {}
        self._begin(0, {"documents": None, "offset": 0, "passes": 0, "fresh": 0})
        first = self._block(0).rows
        first.check_labels()
        settings = json.dumps([documents.settings, shuffle_buffer]).encode()
        self._digest = hashlib.sha256(settings + first.digest().encode()).hexdigest()[:16]

    def order(self, batch_size: int, accumulation: int, seed: int, rank: int = 0, processes: int = 1) -> StreamOrder:
        """The order in which a run sees the rows."""
        return StreamOrder(
            self.size, self.shuffle, self._passes_before, batch_size, accumulation, seed, rank, processes
        )  # fmt: skip

    def digest(self) -> str:
        """Fingerprint of what the rows follow from, and of the first block."""
        return self._digest

    def check_vocabulary(self, size: int) -> None:
        """Raises UserError for a token that a vocabulary of this size does not have, now or when it is read."""
        self._vocabulary = size
        for block in self._blocks.values():
            block.rows.check_vocabulary(size)

    def valid(self, rows: np.ndarray) -> int:
        """Labels in the rows of these numbers, which may be older than what is in memory."""
        return sum(int(self._known(row // self.size)[0][row % self.size]) for row in rows.flat)

    def batch(self, rows: np.ndarray) -> Batch:
        """The rows of these numbers; what is older than their block is forgotten."""
        for number in [n for n in self._blocks if n < rows.min() // self.size]:
            del self._blocks[number]
        single = [self._block(row // self.size).rows.batch(np.array([row % self.size])) for row in rows]
        return Batch(*(torch.cat(parts) for parts in zip(*single, strict=True)))

    def place(self, rows: int) -> dict[str, Any]:
        """What resuming behind so many rows, all of them used, needs beside their number, as JSON can hold it."""
        number, within = divmod(rows, self.size)
        # the block to come may not be readable, and what was done is to be saved all the same
        return self._block(number).start if within or not number else self._block(number - 1).end

    def resume(self, rows: int, place: dict[str, Any]) -> None:
        """Go on behind so many rows, from what `place` gave for them."""
        self._next.exception()  # the thread must not read on meanwhile
        self._blocks.clear()
        self._seen.clear()
        self._begin(rows // self.size, place)

    def _known(self, number: int) -> tuple[np.ndarray, int]:
        if number not in self._seen:
            self._block(number)
        return self._seen[number]

    def _passes_before(self, row: int) -> int:
        return self._known(row // self.size)[1]

    def _block(self, number: int) -> Block:
        number = int(number)
        if number < self._count and number not in self._blocks:
            raise ValueError(f"block {number} is gone, {self._count} comes next")
        while number >= self._count:
            try:
                block = self._next.result()
                if self._vocabulary is not None:
                    block.rows.check_vocabulary(self._vocabulary)
            except UserError as e:
                raise StreamError(str(e)) from e
            self._next = self._thread.submit(self._read)
            self._blocks[self._count] = block
            self._seen[self._count] = block.rows.valid_R, block.start["passes"]
            self._count += 1
        return self._blocks[number]

    def _begin(self, number: int, place: dict[str, Any]) -> None:
        """Let the next block be this one, which begins there."""
        self._count = number
        self._passes, self._fresh = place["passes"], place["fresh"]  # tokens since the documents began
        self._running: Iterator[Document] = self._documents.begin(place["documents"])
        self._before = self._documents.place()  # of the document that is cut
        self._offset = place["offset"]  # its tokens that are used
        self._rest: Document | None = next(self._running) if self._offset else None
        self._next = self._thread.submit(self._read)

    def _read(self) -> Block:
        start = self._here()
        pieces, wanted = [], self.size * self.length
        while wanted:
            if self._rest is None:
                self._before, self._offset = self._documents.place(), 0
                self._rest = next(self._running, None)
                if self._rest is None:
                    if not self._fresh:
                        raise UserError("the data set has no tokens")
                    self._passes, self._fresh = self._passes + 1, 0
                    self._running = self._documents.begin()
                    continue
                self._fresh += len(self._rest[0])
            ids, learnt = self._rest
            cut = slice(self._offset, self._offset + wanted)
            pieces.append((ids[cut], None if learnt is None else learnt[cut]))
            wanted -= len(ids[cut])
            self._offset += len(ids[cut])
            if self._offset == len(ids):
                self._rest = None
        return Block(start, self._here(), PackedRows(pieces, self.length))

    def _here(self) -> dict[str, Any]:
        cut = self._rest is not None
        return {
            "documents": self._before if cut else self._documents.place(), "offset": self._offset if cut else 0,
            "passes": self._passes, "fresh": self._fresh,
        }  # fmt: skip
