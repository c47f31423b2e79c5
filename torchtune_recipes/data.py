"""Data sets of the recipes: plain text, conversations and mixtures of them, packed in memory or streamed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mamba_hybrid.errors import UserError, first_line

from .chat import check_messages, render, trained_tokens
from .documents import Document, Documents, Mixture, SourceDocuments
from .packing import PackedRows
from .source import Row, RowReader
from .stream import StreamedRows

SHUFFLE_BUFFER = 1024


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint directory.

    Raises:
        UserError: it has none.
    """
    try:
        if not Path(path).is_dir():
            raise FileNotFoundError("no such directory")
        return AutoTokenizer.from_pretrained(path)
    except Exception as e:  # transformers has no common error
        raise UserError(f"student {path} has no tokenizer that transformers can load: {first_line(e)}") from e


def text_documents(
    tokenizer: PreTrainedTokenizerBase,
    source: str | list[str],
    *,
    column: str = "text",
    split: str = "train",
    add_eos: bool = True,
    max_tokens: int | None = None,
    streaming: bool = False,
) -> SourceDocuments:
    """Documents of plain text, a part of `mixed_dataset`.

    Args:
        tokenizer: whose special tokens at the start of a text (a BOS), if it has any, start each document.
        source, column, split, streaming: as `RowReader`.
        add_eos: end each document with the tokenizer's EOS.
        max_tokens: stop reading after about that many.

    Raises:
        UserError: a source, row or tokenizer that does not fit; the message names it.
    """
    tokenizer = _own(tokenizer, streaming)
    eos = tokenizer.eos_token_id
    if add_eos and eos is None:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no EOS; set dataset.add_eos=false")

    def tokenise(rows: list[Row]) -> Iterator[Document]:
        for where, text in rows:
            if not isinstance(text, str):
                raise UserError(f"{where}: column {column!r} holds {type(text).__name__}, not text")
        for ids in tokenizer([text for _, text in rows])["input_ids"]:
            yield [*ids, eos] if add_eos else ids, None

    reader = RowReader(source, column, split, streaming=streaming)
    return SourceDocuments(reader, tokenise, max_tokens, {"kind": "text", "add_eos": add_eos})


def chat_documents(
    tokenizer: PreTrainedTokenizerBase,
    source: str | list[str],
    *,
    column: str = "messages",
    split: str = "train",
    train_on_prompt: bool = False,
    max_tokens: int | None = None,
    streaming: bool = False,
) -> SourceDocuments:
    """Conversations ([{"role", "content"}, ...]) in the tokenizer's chat template, a part of `mixed_dataset`.

    Args:
        tokenizer, source, column, split, max_tokens, streaming: as `text_documents`.
        train_on_prompt: learn every token, not only the assistant's.

    Raises:
        UserError: a source, row or tokenizer that does not fit; the message names it.
    """
    tokenizer = _own(tokenizer, streaming)

    def tokenise(rows: list[Row]) -> Iterator[Document]:
        texts, spans = [], []
        for where, messages in rows:
            messages = check_messages(where, messages)
            text, learnt = render(where, messages, tokenizer, everything=train_on_prompt)
            texts.append(text)
            spans.append(learnt)
        coded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        for ids, offsets, learnt in zip(coded["input_ids"], coded["offset_mapping"], spans, strict=True):
            yield ids, trained_tokens(offsets, learnt)

    reader = RowReader(source, column, split, streaming=streaming)
    return SourceDocuments(reader, tokenise, max_tokens, {"kind": "chat", "train_on_prompt": train_on_prompt})


def text_dataset(
    tokenizer: PreTrainedTokenizerBase,
    source: str | list[str],
    max_seq_len: int,
    *,
    column: str = "text",
    split: str = "train",
    add_eos: bool = True,
    max_tokens: int | None = None,
    streaming: bool = False,
    shuffle_buffer: int | None = None,
) -> PackedRows | StreamedRows:
    """Documents of plain text, packed into rows.

    Args:
        tokenizer, source, column, split, add_eos, max_tokens: as `text_documents`.
        max_seq_len: tokens of a packed row.
        streaming: read while training, for data that do not fit into memory; they have no epochs.
        shuffle_buffer: of a stream, rows that are shuffled together (1024); 1 for the data's own order.

    Raises:
        UserError: a source, row or tokenizer that does not fit, or nothing to learn; the message names it.
    """
    documents = text_documents(
        tokenizer, source, column=column, split=split, add_eos=add_eos, max_tokens=max_tokens, streaming=streaming
    )  # fmt: skip
    return _rows(documents, max_seq_len, streaming, shuffle_buffer)


def chat_dataset(
    tokenizer: PreTrainedTokenizerBase,
    source: str | list[str],
    max_seq_len: int,
    *,
    column: str = "messages",
    split: str = "train",
    train_on_prompt: bool = False,
    max_tokens: int | None = None,
    streaming: bool = False,
    shuffle_buffer: int | None = None,
) -> PackedRows | StreamedRows:
    """Conversations, packed into rows.

    Args:
        tokenizer, source, column, split, train_on_prompt, max_tokens: as `chat_documents`.
        max_seq_len, streaming, shuffle_buffer: as `text_dataset`.

    Raises:
        UserError: a source, row or tokenizer that does not fit, or nothing to learn; the message names it.
    """
    documents = chat_documents(
        tokenizer, source, column=column, split=split, train_on_prompt=train_on_prompt, max_tokens=max_tokens,
        streaming=streaming,
    )  # fmt: skip
    return _rows(documents, max_seq_len, streaming, shuffle_buffer)


def mixed_dataset(
    tokenizer: PreTrainedTokenizerBase,
    parts: list[dict[str, Any]],
    max_seq_len: int,
    *,
    max_tokens: int | None = None,
    streaming: bool = False,
    shuffle_buffer: int | None = None,
) -> PackedRows | StreamedRows:
    """Several sources in fixed shares of tokens; a part that ends starts again until every part was read once.

    Args:
        tokenizer: the student's.
        parts: each {"weight": above 0, "dataset": node of `text_documents` or `chat_documents`}; a part's own
            `max_tokens` bounds what is read of it before it starts again.
        max_seq_len, streaming, shuffle_buffer: as `text_dataset`.
        max_tokens: stop after about that many of all parts.

    Raises:
        UserError: a part that does not fit, or nothing to learn; the message names it.
    """
    from .recipe import check_keys, component  # which imports this file

    if not parts:
        raise UserError("dataset.parts is empty")
    documents: list[Documents] = []
    weights: list[float] = []
    for i, part in enumerate(parts):
        where = f"dataset.parts[{i}]"
        if not isinstance(part, dict):
            raise UserError(f"{where} {part!r} needs weight and dataset")
        check_keys(part, ("weight", "dataset"), f"{where}.")
        weight = part.get("weight")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise UserError(f"{where}.weight {weight!r} must be a number above 0")
        weights.append(weight)
        made = component(
            f"{where}.dataset", OmegaConf.create({"node": part.get("dataset")}).node, tokenizer, streaming=streaming
        )
        if not isinstance(made, SourceDocuments):
            raise UserError(f"{where}.dataset makes {type(made).__name__}; take text_documents or chat_documents")
        documents.append(made)
    return _rows(
        Mixture(documents, weights, max_tokens=max_tokens, endless=streaming), max_seq_len, streaming, shuffle_buffer
    )


def _own(tokenizer: PreTrainedTokenizerBase, streaming: bool) -> PreTrainedTokenizerBase:
    """A stream's thread needs a tokenizer of its own: two threads may not use one."""
    return copy.deepcopy(tokenizer) if streaming else tokenizer


def _rows(
    documents: Documents, max_seq_len: int, streaming: bool, shuffle_buffer: int | None
) -> PackedRows | StreamedRows:
    if streaming:
        buffer = SHUFFLE_BUFFER if shuffle_buffer is None else shuffle_buffer
        if not isinstance(buffer, int) or buffer < 1:
            raise UserError(f"dataset.shuffle_buffer {buffer!r} must be a whole number above 0")
        return StreamedRows(documents, max_seq_len, buffer)
    if shuffle_buffer is not None:
        raise UserError(
            f"dataset.shuffle_buffer {shuffle_buffer} is for streaming=True; all rows are shuffled otherwise"
        )
    rows = PackedRows(documents.begin(), max_seq_len)
    rows.check_labels()
    return rows
