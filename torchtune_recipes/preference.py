"""Preference data: pairs of a chosen and a rejected answer to one prompt, packed into rows.

Shapes: R rows, B rows of one batch, L tokens of a row, P pairs of one batch, M tokens of all answers of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from mamba_hybrid_kernels import PackedDocuments
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mamba_hybrid.errors import UserError

from .chat import check_messages, render_answer, trained_tokens
from .packing import documents_on_device, on_device
from .rows import Rows
from .source import read_rows

AT_ONCE = 256  # pairs given to the tokenizer together, which spreads them over threads
TOO_LONG = ("error", "drop")


class PairBatch(NamedTuple):
    """Rows as the models take them and where the answers in them are, all int64.

    Args:
        tokens: token numbers (B, L).
        documents: numbers 0, 1, ... of the documents within each row (B, L); `PackedDocuments` once `to` was called.
        positions: (M,) of the tokens that predict the answers', in the flattened rows; answer after answer.
        labels: (M,) what they predict.
        sizes: (P, 2) tokens of each chosen and rejected answer; their sum is M.
    """

    tokens: Tensor
    documents: Tensor | PackedDocuments
    positions: Tensor
    labels: Tensor
    sizes: Tensor

    def to(self, device: torch.device) -> PairBatch:
        """The host's rows on a device; the copy to a GPU does not wait."""
        tokens, documents, *answers = self
        assert isinstance(documents, Tensor)
        moved = (on_device(t, device) for t in answers)
        return PairBatch(on_device(tokens, device), documents_on_device(documents, device), *moved)


@dataclass
class Pair:
    """One pair as tokens.

    Args:
        where: it stands in its source, for messages.
        tokens: of the chosen and of the rejected conversation.
        answers: which tokens of each are of the answer; the first does not count, since nothing predicts it.
    """

    where: str
    tokens: list[np.ndarray]
    answers: list[np.ndarray]

    @property
    def length(self) -> int:
        """Tokens of both conversations."""
        return sum(map(len, self.tokens))


class PairRows(Rows):
    """Pairs in rows, first fit: a pair goes into the first row that has room for it.

    Its two conversations are documents of that row, side by side. A row is padded at its end, with a document of its
    own that has no answer.

    Args:
        pairs: in any order, which decides what is packed together.
        length: L, tokens of a row.
        too_long: what to do with a pair that no row holds, "error" or "drop".

    Raises:
        UserError: a pair is too long, or none is left.
    """

    def __init__(self, pairs: Iterable[Pair], length: int, too_long: str = "error") -> None:
        if too_long not in TOO_LONG:
            raise UserError(f"dataset.too_long {too_long!r} is none of {', '.join(TOO_LONG)}")
        kept: list[Pair] = []
        self.dropped = 0
        for pair in pairs:
            if pair.length <= length:
                kept.append(pair)
            elif too_long == "error":
                raise UserError(
                    f"{pair.where}: the pair has {pair.length} tokens, over dataset.max_seq_len {length}; raise it, or "
                    "set dataset.too_long=drop"
                )
            else:
                self.dropped += 1
        if not kept:
            raise UserError(f"no pair is left; {self.dropped} are longer than dataset.max_seq_len {length}")
        rows = _first_fit(kept, length)
        self.tokens_RL = np.zeros((len(rows), length), np.int32)
        self.documents_RL = np.zeros((len(rows), length), np.int32)
        # position t predicts token t + 1 of an answer
        self.counted_RL = np.zeros((len(rows), length), bool)
        self.sizes_R: list[np.ndarray] = []  # (pairs of the row, 2)
        for row, members in enumerate(rows):
            at, document = 0, 0
            for pair in members:
                for tokens, answer in zip(pair.tokens, pair.answers, strict=True):
                    end = at + len(tokens)
                    self.tokens_RL[row, at:end] = tokens
                    self.documents_RL[row, at:end] = document
                    self.counted_RL[row, at : end - 1] = answer[1:]
                    at, document = end, document + 1
            self.documents_RL[row, at:] = document
            self.sizes_R.append(np.array([[answer[1:].sum() for answer in pair.answers] for pair in members]))
        self.valid_R = np.array([len(members) for members in rows])

    def batch(self, rows: np.ndarray) -> PairBatch:
        """The rows of these numbers."""
        tokens_BL = torch.from_numpy(self.tokens_RL[rows].astype(np.int64))
        positions_M = torch.from_numpy(np.flatnonzero(self.counted_RL[rows]))
        return PairBatch(
            tokens_BL,
            torch.from_numpy(self.documents_RL[rows].astype(np.int64)),
            positions_M,
            tokens_BL.flatten()[positions_M + 1],
            torch.from_numpy(np.concatenate([self.sizes_R[row] for row in rows])),
        )


def _first_fit(pairs: list[Pair], length: int) -> list[list[Pair]]:
    """The pairs of each row of that many tokens."""
    free_R = np.full(len(pairs), length)
    rows: list[list[Pair]] = []
    for pair in pairs:
        # the row after the last used one is empty, so there is always one
        row = int(np.argmax(free_R[: len(rows) + 1] >= pair.length))
        if row == len(rows):
            rows.append([])
        rows[row].append(pair)
        free_R[row] -= pair.length
    return rows


def preference_dataset(
    tokenizer: PreTrainedTokenizerBase,
    source: str | list[str],
    max_seq_len: int,
    *,
    chosen: str = "chosen",
    rejected: str = "rejected",
    prompt: str | None = None,
    split: str = "train",
    too_long: str = "error",
) -> PairRows:
    """Pairs of conversations in the tokenizer's chat template, of which the assistant's last answer counts.

    Args:
        tokenizer: with a chat template.
        source, split: as `read_rows`.
        max_seq_len: tokens of a packed row, which must hold both conversations of a pair.
        chosen, rejected: columns of the two conversations ([{"role", "content"}, ...]) with one prompt; or, with
            `prompt`, of the answers to it, each a text or a list of messages.
        prompt: column of the prompt, a text (the user's) or a list of messages; none where the conversations hold it.
        too_long: "error" or "drop", for a pair that is longer than a row.

    Returns:
        The packed pairs; their order follows from the source's.

    Raises:
        UserError: a source, row or tokenizer that does not fit; the message names it.

    Example:
        >>> rows = preference_dataset(tokenizer, "pairs.jsonl", 2048, prompt="question", too_long="drop")
        >>> rows.batch(np.array([0])).sizes  # tokens of the first row's answers, chosen and rejected
    """
    columns = {"chosen": chosen, "rejected": rejected} | ({} if prompt is None else {"prompt": prompt})

    def pairs() -> Iterator[Pair]:
        rows = read_rows(source, columns, split)
        while group := list(islice(rows, AT_ONCE)):
            texts, spans = [], []
            for where, row in group:
                for name, messages in _conversations(where, row).items():
                    text, answer = render_answer(f"{where}, {columns[name]!r}", messages, tokenizer)
                    texts.append(text)
                    spans.append(answer)
            coded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
            tokens = [np.asarray(ids, np.int32) for ids in coded["input_ids"]]
            answers = [
                np.asarray(trained_tokens(offsets, answer), bool)
                for offsets, answer in zip(coded["offset_mapping"], spans, strict=True)
            ]
            for i, (where, _) in enumerate(group):
                both = slice(2 * i, 2 * i + 2)
                if not all(mask[1:].any() for mask in answers[both]):
                    raise UserError(f"{where} has an answer without a token")
                yield Pair(where, tokens[both], answers[both])

    return PairRows(pairs(), max_seq_len, too_long)


def _conversations(where: str, row: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The two conversations of a row, prompt included."""
    both = {}
    for name in ("chosen", "rejected"):
        answer = row[name]
        if "prompt" not in row:
            if isinstance(answer, str):
                raise UserError(
                    f"{where}: {name} is a text without its prompt; set dataset.prompt to the prompt's column"
                )
            messages = answer
        else:
            head, tail = _messages(row["prompt"], "user"), _messages(answer, "assistant")
            if not isinstance(head, list) or not isinstance(tail, list):
                raise UserError(f"{where}: prompt and {name} must be texts or lists of messages")
            messages = head + tail
        both[name] = check_messages(f"{where}, {name}", messages)
    chosen, rejected = ([(m["role"], m["content"]) for m in messages[:-1]] for messages in both.values())
    if chosen != rejected:
        raise UserError(f"{where}: chosen and rejected differ before their last message; a pair has one prompt")
    return both


def _messages(value: Any, role: str) -> Any:
    return [{"role": role, "content": value}] if isinstance(value, str) else value
