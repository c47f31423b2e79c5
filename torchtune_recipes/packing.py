"""Documents packed into rows of one length.

Shapes: R rows, B rows of one batch, L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from mamba_hybrid_kernels import PackedDocuments, document_starts
from torch import Tensor

from mamba_hybrid.errors import UserError
from mamba_hybrid.loss import IGNORED

from .rows import Rows


def on_device(t: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; the copy to a GPU does not wait."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)


def documents_on_device(doc_BL: Tensor, device: torch.device) -> PackedDocuments:
    """The host's ids of documents on a device, with where they begin."""
    rows, length = doc_BL.shape
    first_D1 = on_device(document_starts(doc_BL, rows, length, doc_BL.device), device)
    torch._dynamo.maybe_mark_dynamic(first_D1, 0)  # each batch has another number of them
    return PackedDocuments(on_device(doc_BL, device), first_D1)


class Batch(NamedTuple):
    """Rows as the models and the loss take them, all int64 (B, L).

    Args:
        tokens: token numbers.
        documents: numbers 0, 1, ... of the documents within each row; `PackedDocuments` once `to` was called.
        labels: the token that follows within the same document, -100 where none does or none is to be learnt.
    """

    tokens: Tensor
    documents: Tensor | PackedDocuments
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        """The host's rows on a device; the copy to a GPU does not wait."""
        assert isinstance(self.documents, Tensor)
        documents = documents_on_device(self.documents, device)
        return Batch(on_device(self.tokens, device), documents, on_device(self.labels, device))

    def chunks(self, tokens: int) -> Iterator[Batch]:
        """Its columns, at most so many at a time, with the documents' ids alone."""
        doc_BL = self.documents.ids_BL if isinstance(self.documents, PackedDocuments) else self.documents
        for parts in zip(*(t.split(tokens, 1) for t in (self.tokens, doc_BL, self.labels)), strict=True):
            yield Batch(*parts)


class PackedRows(Rows):
    """All documents one behind another, cut into rows; a document that is cut goes on as one of its own.

    Only the last row is padded, at its end, with a document of its own that has no labels.

    Args:
        documents: (tokens, which of them are learnt or None for all) of each document.
        length: L, tokens of a row.

    Raises:
        UserError: no tokens, or a length below 2.
    """

    def __init__(self, documents: Iterable[tuple[list[int], list[bool] | None]], length: int) -> None:
        if length < 2:
            raise UserError(f"dataset.max_seq_len {length} must be at least 2: a token is learnt from the one before")
        tokens, learnt, starts, end = [], [], [], 0
        for ids, mask in documents:
            if not ids:
                continue
            starts.append(end)
            end += len(ids)
            tokens.append(np.asarray(ids, np.int32))
            learnt.append(np.ones(len(ids), bool) if mask is None else np.asarray(mask, bool))
        if not tokens:
            raise UserError("the data set has no tokens")
        pad = -end % length
        if pad:
            starts.append(end)
            tokens.append(np.zeros(pad, np.int32))
            learnt.append(np.zeros(pad, bool))
        self.tokens_RL = np.concatenate(tokens).reshape(-1, length)
        begins = np.zeros(self.tokens_RL.size, bool)
        begins[starts] = True
        begins_RL = begins.reshape(-1, length)
        begins_RL[:, 0] = True
        self.documents_RL = begins_RL.cumsum(1, dtype=np.int32) - 1
        counted_RL = np.concatenate(learnt).reshape(-1, length)
        # position t learns token t + 1 if that goes on in the same document
        self.counted_RL = np.zeros_like(counted_RL)
        self.counted_RL[:, :-1] = counted_RL[:, 1:] & ~begins_RL[:, 1:]
        self.valid_R = self.counted_RL.sum(1)

    def check_labels(self) -> None:
        """Raises UserError if no token is to be learnt."""
        if not self.valid_R.any():
            raise UserError("no token of the data set is to be learnt: no turns of the assistant, or one-token rows")

    def batch(self, rows: np.ndarray) -> Batch:
        """The rows of these numbers."""
        tokens_BL = torch.from_numpy(self.tokens_RL[rows].astype(np.int64))
        labels_BL = torch.where(torch.from_numpy(self.counted_RL[rows]), tokens_BL.roll(-1, 1), IGNORED)
        return Batch(tokens_BL, torch.from_numpy(self.documents_RL[rows].astype(np.int64)), labels_BL)
