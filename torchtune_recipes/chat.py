"""Conversations as tokens, with the assistant's own told apart from the prompt's."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from mamba_hybrid.errors import UserError, first_line


def check_messages(where: str, messages: Any) -> list[dict[str, Any]]:
    """The conversation as a list of {"role", "content"}.

    Raises:
        UserError: it is none; `where` names the row.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where} is no conversation: a list of messages with role and content is needed")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"{where} has a message without a role: {message!r:.80}")
        if not isinstance(message.get("content"), str):
            raise UserError(f"{where} has a message of {message['role']!r} without text under 'content'")
    return messages


def render(
    where: str, messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, *, everything: bool = False
) -> tuple[str, list[range]]:
    """The conversation in the tokenizer's chat template, and the spans of characters to learn.

    These are what the assistant wrote, the mark that ends its turn included, since a model has to end it; or,
    with `everything`, all.

    Raises:
        UserError: the tokenizer has no template, the template refuses the conversation, or it rewrites earlier
            turns when later ones come, so that the assistant's part cannot be told.
    """

    def template(upto: int, prompt: bool) -> str:
        return _apply_template(where, messages[:upto], tokenizer, prompt)

    text = template(len(messages), False)
    if everything:
        return text, [range(len(text))]
    cuts = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            cuts.append((len(head := template(i, True)) if i else 0, len(body := template(i + 1, False))))
            if not text.startswith(body) or (i and not body.startswith(head)):
                raise UserError(
                    f"{where}: the chat template changes earlier turns as later ones come; "
                    "set dataset.train_on_prompt=true"
                )
    for (_, end), (start, _) in pairwise(cuts):
        if start < end:
            raise UserError(f"{where}: two turns of the assistant follow each other")
    return text, [range(start, end) for start, end in cuts]


def render_answer(
    where: str, messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[range]]:
    """As `render`, but only the assistant's last answer is learnt: earlier turns may change as the template likes.

    Raises:
        UserError: the last message is not the assistant's, the tokenizer has no template, or the template refuses the
            conversation or does not begin it with the prompt.
    """
    if messages[-1]["role"] != "assistant":
        raise UserError(
            f"{where} ends with a message of {messages[-1]['role']!r}; the last one must be the assistant's"
        )
    head = _apply_template(where, messages[:-1], tokenizer, True) if len(messages) > 1 else ""
    text = _apply_template(where, messages, tokenizer, False)
    if not text.startswith(head):
        raise UserError(f"{where}: the chat template changes the prompt as the answer comes")
    return text, [range(len(head), len(text))]


def _apply_template(
    where: str, messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, prompt: bool
) -> str:
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template; plain text (text_dataset) needs none"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except Exception as e:  # Jinja's errors and whatever a template raises
        raise UserError(f"{where} does not fit the chat template: {first_line(e)}") from e


def trained_tokens(offsets: list[tuple[int, int]], spans: list[range]) -> list[bool]:
    """Which tokens, given the characters each stands for, begin in one of the spans (both in order)."""
    trained, at = [], 0
    for start, _ in offsets:
        while at < len(spans) and start >= spans[at].stop:
            at += 1
        trained.append(at < len(spans) and start in spans[at])
    return trained
