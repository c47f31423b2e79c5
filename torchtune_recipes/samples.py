"""What the student in training answers to a few prompts, every so many steps: `samples` of a configuration.

Shapes: R prompts, L tokens of the longest with its answer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig
from transformers import PreTrainedTokenizerBase

from mamba_hybrid.errors import UserError

from .metrics import JSONLLogger
from .models import Student

KEYS = ("prompts", "every", "max_new_tokens")
FILE = "samples.jsonl"


class Samples:
    """Greedy answers, written to output_dir/samples.jsonl and handed to the loggers that take text.

    Every process goes through the same forward passes on the same prompts, since FSDP gathers the layers together: the
    whole text is read again for each token, without a cache, which is exact and for a few prompts fast enough.

    Args:
        node: {prompts, every, max_new_tokens}.
        tokenizer: the student's; a prompt is put into its chat template, if it has one.
        limit: tokens of the model's context.

    Raises:
        UserError: a missing or wrong key, or a prompt that leaves no room.
    """

    def __init__(self, node: DictConfig, tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
        if not isinstance(node, DictConfig):
            raise UserError(f"samples {node!r} must hold {', '.join(KEYS)}")
        if odd := sorted(str(key) for key in set(node) - set(KEYS)):
            raise UserError(f"unknown config key samples.{odd[0]}; there are {', '.join(KEYS)}")
        prompts, self.every = node.get("prompts"), node.get("every")
        self.new = node.get("max_new_tokens", 64)
        if not isinstance(prompts, ListConfig) or not prompts or not all(isinstance(p, str) and p for p in prompts):
            raise UserError(f"samples.prompts {prompts!r} must be a list of texts")
        for key, value in (("every", self.every), ("max_new_tokens", self.new)):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"samples.{key} {value!r} must be a whole number above 0")
        self.prompts, self.tokenizer = list(prompts), tokenizer
        self.ids = [self._encode(prompt) for prompt in self.prompts]
        longest = max(map(len, self.ids)) + self.new
        if longest > limit:
            raise UserError(f"samples: prompt and max_new_tokens are {longest} tokens, over the model's {limit}")

    def _encode(self, prompt: str) -> list[int]:
        if self.tokenizer.chat_template is None:
            return self.tokenizer(prompt)["input_ids"]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def answers(self, student: Student, device: torch.device) -> list[str]:
        """The student's answers; for all processes together. Neither weights nor random state change."""
        stop = self.tokenizer.eos_token_id
        rows, going = [list(ids) for ids in self.ids], [True] * len(self.ids)
        L = max(map(len, rows)) + self.new
        for _ in range(self.new):
            # padded on the right, where no token before it looks
            tokens_RL = torch.zeros(len(rows), L, dtype=torch.int64, device=device)
            for i, row in enumerate(rows):
                tokens_RL[i, : len(row)] = torch.tensor(row, device=device)
            last_R = torch.tensor([len(row) - 1 for row in rows], device=device)
            chosen = student.next_tokens(tokens_RL, last_R).tolist()
            for i, token in enumerate(chosen):
                if going[i] and token != stop:
                    rows[i].append(token)
                else:
                    going[i] = False
            if not any(going):  # the same on all processes: they computed the same
                break
        student.release()
        new = [row[len(ids) :] for row, ids in zip(rows, self.ids, strict=True)]
        return self.tokenizer.batch_decode(new, skip_special_tokens=True)

    def write(self, directory: str | Path, step: int, answers: list[str], loggers: list[Any]) -> None:
        """Append a line for each prompt; a logger with a TensorBoard writer or `log_text` shows them as well."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        with (Path(directory) / FILE).open("a") as f:
            for prompt, answer in zip(self.prompts, answers, strict=True):
                f.write(json.dumps({"step": step, "prompt": prompt, "answer": answer}) + "\n")
        text = "\n\n".join(f"**{p}**\n\n{a}" for p, a in zip(self.prompts, answers, strict=True))
        for logger in loggers:
            if hasattr(logger, "log_text"):
                logger.log_text("samples", text, step)
            elif (writer := getattr(logger, "_writer", None)) is not None:  # torchtune's TensorBoardLogger
                writer.add_text("samples", text, step)

    @staticmethod
    def rewind(directory: str | Path, step: int) -> None:
        """Forget the answers after a step, which a resumed run gives again."""
        file = Path(directory) / FILE
        if file.is_file():
            JSONLLogger(str(file)).rewind(step)
