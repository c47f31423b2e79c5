"""Tokenised documents, one after another, from any place on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Protocol

from mamba_hybrid.errors import UserError

from .source import Row, RowReader

AT_ONCE = 512  # rows given to the tokenizer together, which spreads them over threads

Document = tuple[list[int], list[bool] | None]  # tokens, and which of them are learnt, None for all


class Documents(Protocol):
    """Documents in an order of their own."""

    settings: dict[str, Any]  # what they follow from, as JSON can hold it

    def begin(self, place: dict[str, Any] | None = None) -> Iterator[Document]:
        """The documents from a place on, None for the first. One such iterator runs at a time."""

    def place(self) -> dict[str, Any]:
        """Behind the last document that was given, as JSON can hold it."""


class SourceDocuments:
    """The documents of one source.

    Args:
        reader: of its rows.
        tokenise: makes documents of some rows, one of each.
        max_tokens: end after about that many, None for all.
        settings: what else the documents follow from.
    """

    def __init__(
        self,
        reader: RowReader,
        tokenise: Callable[[list[Row]], Iterable[Document]],
        max_tokens: int | None,
        settings: dict[str, Any],
    ) -> None:
        self._reader, self._tokenise, self.max_tokens = reader, tokenise, max_tokens
        self.settings = settings | {
            "source": [str(file) for file in reader.files] or reader.source,
            "column": reader.column,
            "split": reader.split,
            "max_tokens": max_tokens,
        }
        self._rows: dict[str, Any] | None = None
        self._given = self._seen = 0

    def begin(self, place: dict[str, Any] | None = None) -> Iterator[Document]:
        # where a group of rows begins, how many documents of it were given, and the tokens of all that were
        place = place or {"rows": None, "given": 0, "seen": 0}
        rows = self._reader.begin(place["rows"])
        self._rows, self._given, self._seen = self._reader.place(), place["given"], place["seen"]
        return self._documents(rows)

    def _documents(self, rows: Iterator[Row]) -> Iterator[Document]:
        while self.max_tokens is None or self._seen < self.max_tokens:
            group = list(islice(rows, AT_ONCE))
            if not group:
                return
            for ids, learnt in islice(self._tokenise(group), self._given, None):
                self._given += 1
                self._seen += len(ids)
                yield ids, learnt
                if self.max_tokens is not None and self._seen >= self.max_tokens:
                    return
            self._rows, self._given = self._reader.place(), 0

    def place(self) -> dict[str, Any]:
        return {"rows": self._rows, "given": self._given, "seen": self._seen}


class Mixture:
    """Documents of several sources, in such turns that each part's tokens follow its weight.

    The next document is one of the part that is furthest behind its share, so that no random numbers are needed. A part
    that ends starts again.

    Args:
        parts: their documents.
        weights: how many tokens of each, relative to the others', above 0.
        max_tokens: end after about that many.
        endless: go on when every part has been read once, for streams; else that is the end.

    Raises:
        UserError: while reading, a part without tokens.
    """

    def __init__(
        self, parts: list[Documents], weights: list[float], *, max_tokens: int | None = None, endless: bool = False
    ) -> None:
        self.parts, self.weights, self.max_tokens, self.endless = parts, weights, max_tokens, endless
        self.settings = {
            "parts": [part.settings for part in parts], "weights": weights, "max_tokens": max_tokens,
        }  # fmt: skip
        self.tokens = self.passes = self._fresh = [0] * len(parts)

    def begin(self, place: dict[str, Any] | None = None) -> Iterator[Document]:
        none = [0] * len(self.parts)
        place = place or {"parts": [None for _ in self.parts], "tokens": none, "passes": none, "fresh": none}
        self.tokens, self.passes = list(place["tokens"]), list(place["passes"])
        self._fresh = list(place["fresh"])  # tokens of the pass that a part is in
        return self._documents([part.begin(at) for part, at in zip(self.parts, place["parts"], strict=True)])

    def _documents(self, running: list[Iterator[Document]]) -> Iterator[Document]:
        while self.max_tokens is None or sum(self.tokens) < self.max_tokens:
            i = min(range(len(self.parts)), key=lambda i: self.tokens[i] / self.weights[i])
            document = next(running[i], None)
            if document is None:
                if not self._fresh[i]:
                    raise UserError(f"dataset.parts[{i}] has no tokens")
                self.passes[i] += 1
                if not self.endless and all(self.passes):
                    return
                running[i], self._fresh[i] = self.parts[i].begin(), 0
                continue
            self.tokens[i] += len(document[0])
            self._fresh[i] += len(document[0])
            yield document

    def place(self) -> dict[str, Any]:
        return {
            "parts": [part.place() for part in self.parts], "tokens": list(self.tokens),
            "passes": list(self.passes), "fresh": list(self._fresh),
        }  # fmt: skip
