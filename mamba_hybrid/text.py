"""Plain text from files, and rows of tokens from text."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .errors import UserError


def read_texts(path: str | Path, column: str = "text") -> list[str]:
    """Passages of a .txt file (the whole file is one) or of a .jsonl file (one a row, under `column`).

    Raises:
        UserError: no such file, nothing in it, a row that is no JSON or lacks the column.
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"text {path} cannot be read: {getattr(e, 'strerror', None) or e}") from e
    if path.suffix != ".jsonl":
        texts = [content]
    else:
        texts = []
        for number, line in enumerate(content.splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as e:
                raise UserError(f"{path}, line {number} is no JSON: {e}") from e
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                have = sorted(row) if isinstance(row, dict) else type(row).__name__
                raise UserError(f"{path}, line {number} has no text under {column!r} (there is {have}); see --column")
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
