import numpy as np
import pytest
import torch

from mamba_hybrid.errors import UserError
from tests.tiny import tokenizer
from torchtune_recipes.recall import ordinary_tokens, recall_rows

TEXT = torch.arange(300).view(3, 100) % 40


def test_each_question_was_told_once_before():
    vocabulary = np.arange(200)
    tokens, asked, answers = recall_rows(TEXT, vocabulary, 8, [0, 1])
    assert torch.equal(tokens[:, 0], TEXT[:, 0])
    assert asked.tolist() == [list(range(84, 100, 2))] * 3
    for row, at, values, text in zip(tokens.tolist(), asked.tolist(), answers.tolist(), TEXT.tolist(), strict=True):
        assert len({row[i] for i in at}) == 8
        told = []
        for i, value in zip(at, values, strict=True):
            assert row[i + 1] == value
            (j,) = (j for j in range(84) if row[j] == row[i])
            assert row[j + 1] == value and row[i] not in text
            told.append(j)
        assert told != sorted(told)
        assert sum(a != b for a, b in zip(row[:84], text[:84], strict=True)) <= 16  # the rest is the text


def test_a_row_does_not_depend_on_those_beside_it_and_steps_differ():
    together = recall_rows(TEXT, np.arange(200), 8, [0, 1])
    alone = recall_rows(TEXT[1:2], np.arange(200), 8, [0, 1])
    assert all(torch.equal(a[1:2], b) for a, b in zip(together, alone, strict=True))
    assert not torch.equal(recall_rows(TEXT, np.arange(200), 8, [0, 2])[0], together[0])


def test_special_tokens_are_no_pairs():
    vocabulary = ordinary_tokens(tokenizer(), 259)
    assert vocabulary.tolist() == list(range(256))
    assert ordinary_tokens(tokenizer(), 100).tolist() == list(range(100))


@pytest.mark.parametrize(
    ("pairs", "tokens", "words"), [(25, 200, "rows of 101 tokens"), (8, 45, "only 5 tokens do not occur")]
)
def test_refused(pairs, tokens, words):
    with pytest.raises(UserError, match=words):
        recall_rows(TEXT, np.arange(tokens), pairs, [0])
