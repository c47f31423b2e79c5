"""Plain text from files, and rows of tokens from text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .errors import UserError


def read_file(path: Path) -> str:
    """A UTF-8 file's content.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path} cannot be read: {e}") from e


def parse_row(line: str, where: str) -> Any:
    """What a line of a JSONL file holds.

    Args:
        line: the line.
        where: it stands, for the message.

    Raises:
        UserError: it is no JSON, or holds half of a surrogate pair (a character cut in two), which is no text.
    """
    try:
        row = json.loads(line)
        if re.search(r"\\u[dD][89a-fA-F]", line):
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
        raise UserError(f"{where} holds {e.object[e.start]!r}, half of a character; mend or remove it") from e
    except ValueError as e:
        raise UserError(f"{where} is no JSON: {e}") from e
    return row


def jsonl_rows(path: Path, skip: int = 0) -> Iterator[tuple[str, Any]]:
    """(where it stands, for error messages; the row) of a JSONL file, empty lines left out.

    Args:
        path: the file.
        skip: pass over so many rows without reading what is in them.

    Raises:
        UserError: the file cannot be read, or as `parse_row`.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                if skip:
                    skip -= 1
                    continue
                where = f"{path}, line {number}"
                yield where, parse_row(line, where)
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path} cannot be read: {e}") from e


def read_texts(path: str | Path, column: str = "text") -> list[str]:
    """Passages of a .txt file (the whole file is one) or of a .jsonl file (one a row, under `column`).

    Raises:
        UserError: no such file, nothing in it, a row that is no JSON or lacks the column.
    """
    path = Path(path)
    texts = []
    if path.suffix != ".jsonl":
        texts.append(read_file(path))
    else:
        for where, row in jsonl_rows(path):
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                have = sorted(row) if isinstance(row, dict) else type(row).__name__
                raise UserError(f"{where} has no text under {column!r} (there is {have}); see --column")
            texts.append(row[column])
    texts = [t for t in texts if t.strip()]
    if not texts:
        raise UserError(f"text {path} is empty")
    return texts


def token_stream(texts: list[str], tokenizer: PreTrainedTokenizerBase, limit: int) -> tuple[Tensor, Tensor]:
    """Passages joined into one stream of tokens.

    Args:
        texts: the passages, without special tokens between them.
        tokenizer: the model's.
        limit: most tokens to take.

    Returns:
        tokens (T,) and the number of the passage each belongs to (T,), both int64; T is at most `limit`.
    """
    tokens: list[int] = []
    passage: list[int] = []
    for i, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens += ids
        passage += [i] * len(ids)
        if len(tokens) >= limit:
            break
    return torch.tensor(tokens[:limit]), torch.tensor(passage[:limit])
