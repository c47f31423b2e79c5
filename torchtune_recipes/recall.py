"""A synthetic retrieval task: pairs of tokens hidden in a text, and questions for them at its end.

Shapes: B rows, L tokens, W ordinary tokens of a vocabulary, A pairs of a row.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mamba_hybrid.errors import UserError


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> np.ndarray:
    """The tokenizer's tokens below `size` (W,) that are neither special nor added."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    return np.array(sorted(i for i in tokenizer.get_vocab().values() if i < size and i not in special))


def recall_rows(tokens_BL: Tensor, vocabulary_W: np.ndarray, pairs: int, seed: list[int]) -> tuple[Tensor, ...]:
    """Rows of text in which A pairs of a key and a value stand somewhere, and again at the end in another order.

    After each key at the end, what follows is the value that followed it before: to be recalled over up to L tokens.
    Keys do not occur in the text, and each is used once; a row's pairs and places follow from the seed and the
    row's own tokens, whatever rows are beside it.

    Args:
        tokens_BL: int64 rows of text, which these are written over.
        vocabulary_W: tokens to draw from.
        pairs: A; 4 A + 1 tokens must fit into a row.
        seed: non-negative numbers.

    Returns:
        int64 tokens (B, L), and of the questions the position of the key (B, A) and the value that follows (B, A).

    Raises:
        UserError: more pairs than fit, or than there are tokens for.
    """
    B, L = tokens_BL.shape
    A = pairs
    if 4 * A + 1 > L:
        raise UserError(
            f"recall.pairs {A} need rows of {4 * A + 1} tokens, dataset.max_seq_len is {L}; lower recall.pairs"
        )
    rows_BL = tokens_BL.cpu().numpy().copy()
    asked = L - 2 * A + 2 * np.arange(A)
    answers_BA = np.empty((B, A), np.int64)
    for row_L, answers_A in zip(rows_BL, answers_BA, strict=True):
        rng = np.random.default_rng([*seed, zlib.crc32(row_L.tobytes())])
        unused = np.setdiff1d(vocabulary_W, row_L)
        if len(unused) < A:
            raise UserError(f"recall.pairs {A}: only {len(unused)} tokens do not occur in a row; lower recall.pairs")
        keys_A, values_A = rng.choice(unused, A, replace=False), rng.choice(vocabulary_W, A)
        told_A = 1 + 2 * rng.choice((L - 2 * A - 1) // 2, A, replace=False)  # the first token may be a BOS
        row_L[told_A], row_L[told_A + 1] = keys_A, values_A
        order = rng.permutation(A)
        row_L[asked], row_L[asked + 1] = keys_A[order], values_A[order]
        answers_A[:] = values_A[order]
    return tuple(torch.from_numpy(a) for a in (rows_BL, np.tile(asked, (B, 1)), answers_BA))
