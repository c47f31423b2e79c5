"""Data sets of the recipes: plain text or conversations, tokenised once and kept packed in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mamba_hybrid.errors import UserError

from .chat import check_messages, render, trained_tokens
from .packing import PackedRows
from .source import read_rows

AT_ONCE = 512  # rows given to the tokenizer together, which spreads them over threads

Documents = Iterator[tuple[list[int], list[bool] | None]]


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
        raise UserError(f"student {path} has no tokenizer that transformers can load: {str(e).splitlines()[0]}") from e


def text_dataset(
    tokenizer: PreTrainedTokenizerBase,
    source: str | list[str],
    max_seq_len: int,
    *,
    column: str = "text",
    split: str = "train",
    add_eos: bool = True,
    max_tokens: int | None = None,
) -> PackedRows:
    """Documents of plain text.

    Args:
        tokenizer: whose special tokens at the start of a text (a BOS), if it has any, start each document.
        source, column, split: as `read_rows`.
        max_seq_len: tokens of a packed row.
        add_eos: end each document with the tokenizer's EOS.
        max_tokens: stop reading after about that many.

    Raises:
        UserError: a source, row or tokenizer that does not fit; the message names it.
    """

    def documents() -> Documents:
        eos = tokenizer.eos_token_id
        if add_eos and eos is None:
            raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no EOS; set dataset.add_eos=false")
        for rows in _groups(read_rows(source, column, split)):
            for where, text in rows:
                if not isinstance(text, str):
                    raise UserError(f"{where}: column {column!r} holds {type(text).__name__}, not text")
            for ids in tokenizer([text for _, text in rows])["input_ids"]:
                yield [*ids, eos] if add_eos else ids, None

    return PackedRows(_limit(documents(), max_tokens), max_seq_len)


def chat_dataset(
    tokenizer: PreTrainedTokenizerBase,
    source: str | list[str],
    max_seq_len: int,
    *,
    column: str = "messages",
    split: str = "train",
    train_on_prompt: bool = False,
    max_tokens: int | None = None,
) -> PackedRows:
    """Conversations ([{"role", "content"}, ...]) in the tokenizer's chat template.

    Args:
        tokenizer, source, max_seq_len, column, split, max_tokens: as `text_dataset`.
        train_on_prompt: learn every token, not only the assistant's.

    Raises:
        UserError: a source, row or tokenizer that does not fit; the message names it.
    """

    def documents() -> Documents:
        for rows in _groups(read_rows(source, column, split)):
            texts, spans = [], []
            for where, messages in rows:
                messages = check_messages(where, messages)
                text, learnt = render(where, messages, tokenizer, everything=train_on_prompt)
                texts.append(text)
                spans.append(learnt)
            coded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
            for ids, offsets, learnt in zip(coded["input_ids"], coded["offset_mapping"], spans, strict=True):
                yield ids, trained_tokens(offsets, learnt)

    return PackedRows(_limit(documents(), max_tokens), max_seq_len)


def _groups(rows: Iterable[tuple[str, Any]]) -> Iterator[list[tuple[str, Any]]]:
    rows = iter(rows)
    while group := list(islice(rows, AT_ONCE)):
        yield group


def _limit(documents: Documents, max_tokens: int | None) -> Documents:
    seen = 0
    for document in documents:
        yield document
        seen += len(document[0])
        if max_tokens is not None and seen >= max_tokens:
            return
