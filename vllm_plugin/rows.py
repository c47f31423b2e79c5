"""Rows of prompts for batch generation, read and checked before an engine is started."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mamba_hybrid.errors import UserError
from mamba_hybrid.text import parse_row


@dataclass
class Row:
    """One request.

    Args:
        id: of the row, its "id" or its line number.
        line: number of its line.
        data: the row as read.
        tokens: its prompt.
    """

    id: str | int
    line: int
    data: dict[str, Any]
    tokens: list[int]


def read_rows(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Rows of a .jsonl file, each {"prompt": text} or {"messages": [...]}, with an optional "id".

    Args:
        path: the file; empty lines are passed over.
        tokenizer: with a chat template if a row has messages.

    Raises:
        UserError: no such file, nothing in it, or the first row that cannot be asked, by its line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--input {path} cannot be read: {getattr(e, 'strerror', None) or e}") from e
    rows = [_row(f"{path}, line {n}", n, line, tokenizer) for n, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"--input {path} is empty")
    seen: dict[str | int, int] = {}
    for row in rows:
        if row.id in seen:
            raise UserError(f"{path}, line {row.line}: id {row.id!r} is that of line {seen[row.id]} too")
        seen[row.id] = row.line
    return rows


def _row(where: str, number: int, line: str, tokenizer: PreTrainedTokenizerBase) -> Row:
    data = parse_row(line, where)
    if not isinstance(data, dict):
        raise UserError(f"{where} is {type(data).__name__}, not an object with 'prompt' or 'messages'")
    if ("prompt" in data) == ("messages" in data):
        raise UserError(f"{where} must have one of 'prompt' and 'messages'; it has the keys {sorted(data)}")
    id = data.get("id", number)
    if isinstance(id, bool) or not isinstance(id, str | int):
        raise UserError(f"{where}: id {id!r} is neither a string nor an integer")
    if "prompt" in data:
        if not isinstance(data["prompt"], str):
            raise UserError(f"{where}: 'prompt' is {type(data['prompt']).__name__}, not a string")
        tokens = tokenizer(data["prompt"])["input_ids"]
    else:
        tokens = _chat(where, data["messages"], tokenizer)
    if not tokens:
        raise UserError(f"{where}: the prompt is empty")
    return Row(id, number, data, list(tokens))


def _chat(where: str, messages: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: 'messages' must be a list of at least one message")
    for message in messages:
        strings = isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))
        if not strings:
            raise UserError(f"{where}: message {message!r} must have a 'role' and a 'content', both strings")
    if tokenizer.chat_template is None:
        raise UserError(f"{where} has 'messages', and the model no chat template; give 'prompt' rows")
    try:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as e:  # templates raise what they like, on an unknown role for one
        raise UserError(f"{where}: the chat template refuses the messages: {e}") from e
    return tokenizer(prompt, add_special_tokens=False)["input_ids"]
