import json

import numpy as np
import pytest
import torch

from mamba_hybrid.errors import UserError
from tests.tiny import tokenizer
from torchtune_recipes.preference import Pair, PairRows, preference_dataset
from torchtune_recipes.source import read_rows

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# thoughts of earlier turns are left out, as some models' templates do
FORGETFUL = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content if loop.last else m.content.split('#')[-1] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [
    {"role": "user", "content": "two and two?"},
    {"role": "assistant", "content": "let me see#four"},
    {"role": "user", "content": "sure?"},
]


def chatty(template=TEMPLATE):
    t = tokenizer()
    t.chat_template = template
    return t


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def pair(chosen, rejected, answer=2):
    """A pair of that many tokens, the last `answer` of each are the answer."""
    tokens = [np.arange(n) + 10 * n for n in (chosen, rejected)]
    return Pair("here", tokens, [np.arange(n) >= n - answer for n in (chosen, rejected)])


def answers(rows, row):
    """Texts of the answers in a row, as a model would be asked for them."""
    batch = rows.batch(np.array([row]))
    return [tokenizer().decode(part) for part in batch.labels.split(batch.sizes.flatten().tolist())]


def test_first_fit_into_rows_that_are_padded_at_their_end():
    rows = PairRows([pair(4, 3), pair(5, 3), pair(2, 3), pair(3, 3)], 14)
    assert len(rows) == 2 and rows.length == 14
    assert rows.valid_R.tolist() == [2, 2]
    batch = rows.batch(np.array([0, 1]))
    # 7 + 5 and 2 of padding | 8 + 6
    assert batch.documents.tolist() == [
        [0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4],
        [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3],
    ]
    assert batch.tokens[0].tolist() == [40, 41, 42, 43, 30, 31, 32, 20, 21, 30, 31, 32, 0, 0]
    assert {t.dtype for t in batch} == {torch.int64}


def test_answers_stand_pair_by_pair_and_a_token_is_predicted_by_the_one_before():
    packed = [pair(4, 3), pair(5, 3, answer=1), pair(2, 3), pair(3, 3)]
    rows = PairRows(packed, 14)
    batch = rows.batch(np.array([1, 0]))
    there = [packed[i] for i in (1, 3, 0, 2)]  # as the test above shows
    expected = [t[a & (np.arange(len(t)) > 0)] for p in there for t, a in zip(p.tokens, p.answers, strict=True)]
    assert batch.sizes.tolist() == [[1, 1], [2, 2], [2, 2], [1, 2]]
    assert batch.labels.tolist() == np.concatenate(expected).tolist()
    flat, documents = batch.tokens.flatten(), batch.documents.flatten()
    assert torch.equal(flat[batch.positions + 1], batch.labels)
    assert torch.equal(documents[batch.positions + 1], documents[batch.positions])
    assert torch.equal(batch.positions // 14, torch.tensor([0] * 6 + [1] * 7))


def test_digest_changes_with_the_tokens_and_with_the_answers():
    digests = {PairRows([p], 9).digest() for p in (pair(4, 3), pair(3, 4), pair(4, 3, answer=1))}
    assert len(digests) == 3


def test_only_the_last_answer_counts_in_every_form_of_a_row(tmp_path):
    tails = {"chosen": "yes!", "rejected": "why not"}
    last = {name: [{"role": "assistant", "content": text}] for name, text in tails.items()}
    forms = {
        "conversations": ({name: TALK + tail for name, tail in last.items()}, {}),
        "prompt and texts": ({"q": TALK[0]["content"], **tails}, {"prompt": "q"}),
        "prompt and messages": ({"q": TALK, **last}, {"prompt": "q"}),
        "other names": ({"good": TALK + last["chosen"], "bad": TALK + last["rejected"]},
                        {"chosen": "good", "rejected": "bad"}),
    }  # fmt: skip
    for name, (row, columns) in forms.items():
        rows = preference_dataset(chatty(), write(tmp_path / "p.jsonl", [row]), 200, **columns)
        assert answers(rows, 0) == ["yes!<|end|>", "why not<|end|>"], name
        (tokens, documents, *_) = rows.batch(np.array([0]))
        prompt = TALK[:1] if name == "prompt and texts" else TALK
        said = "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in prompt) + "<|assistant|>"
        for document, tail in enumerate(tails.values()):
            assert tokenizer().decode(tokens[documents == document]) == f"{said}{tail}<|end|>", name


def test_a_template_may_rewrite_the_turns_before(tmp_path):
    row = {name: [*TALK, {"role": "assistant", "content": text}] for name, text in (("chosen", "a"), ("rejected", "b"))}
    rows = preference_dataset(chatty(FORGETFUL), write(tmp_path / "p.jsonl", [row]), 200)
    assert answers(rows, 0) == ["a<|end|>", "b<|end|>"]


def test_too_long(tmp_path):
    texts = [{"prompt": "p", "chosen": "a" * n, "rejected": "b"} for n in (3, 90, 4, 80)]
    source = write(tmp_path / "p.jsonl", texts)
    with pytest.raises(UserError, match=r"line 2: the pair has 101 tokens, over dataset.max_seq_len 40.*too_long=drop"):
        preference_dataset(chatty(), source, 40, prompt="prompt")
    rows = preference_dataset(chatty(), source, 40, prompt="prompt", too_long="drop")
    assert rows.dropped == 2 and rows.valid_R.sum() == 2
    with pytest.raises(UserError, match="no pair is left; 4 are longer"):
        preference_dataset(chatty(), source, 4, prompt="prompt", too_long="drop")
    with pytest.raises(UserError, match="too_long 'cut' is none of error, drop"):
        preference_dataset(chatty(), source, 40, prompt="prompt", too_long="cut")


USER, ASSISTANT = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}


@pytest.mark.parametrize(
    ("row", "prompt", "says"),
    [
        ({"chosen": [USER, ASSISTANT]}, None, r"no column 'rejected', only \['chosen'\]; set dataset.rejected"),
        ({"chosen": "a", "rejected": "b"}, None, "chosen is a text without its prompt; set dataset.prompt"),
        ({"chosen": "a", "rejected": "b"}, "q", "no column 'q'.*set dataset.prompt"),
        ({"q": 3, "chosen": "a", "rejected": "b"}, "q", "must be texts or lists"),
        ({"chosen": [USER, ASSISTANT], "rejected": []}, None, "rejected is no conversation"),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER]}, None, "differ before their last message"),
        ({"chosen": [USER], "rejected": [USER]}, None, "ends with a message of 'user'"),
        (
            {"chosen": [USER, ASSISTANT], "rejected": [{**USER, "content": "z"}, ASSISTANT]},
            None,
            "line 1: chosen and rejected differ before their last message",
        ),
    ],
)
def test_bad_rows(tmp_path, row, prompt, says):
    with pytest.raises(UserError, match=says):
        preference_dataset(chatty(), write(tmp_path / "p.jsonl", [row]), 64, prompt=prompt)


def test_bad_tokenizers_and_no_rows(tmp_path):
    source = write(tmp_path / "p.jsonl", [{"q": "x", "chosen": "a", "rejected": "b"}])
    with pytest.raises(UserError, match="no chat template"):
        preference_dataset(chatty(None), source, 64, prompt="q")
    changing = (
        "{% if add_generation_prompt %}<|assistant|>{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(UserError, match="line 1, 'chosen': the chat template changes the prompt"):
        preference_dataset(chatty(changing), source, 64, prompt="q")
    silent = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="line 1 has an answer without a token"):
        preference_dataset(chatty(silent), source, 64, prompt="q")
    with pytest.raises(UserError, match="no pair is left"):
        preference_dataset(chatty(), write(tmp_path / "none.jsonl", []), 64)


def test_several_columns_of_every_source(tmp_path, monkeypatch):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"a": str(i), "b": [i], "c": None} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, streaming: datasets.Dataset.from_list(rows))
    for source in (write(tmp_path / "t.jsonl", rows), str(tmp_path / "t.parquet"), "some/name"):
        got = [value for _, value in read_rows(source, {"x": "b", "y": "a"})]
        assert got == [{"x": [i], "y": str(i)} for i in range(3)]
        with pytest.raises(UserError, match=r"1 has no column 'd'.*set dataset.y"):
            list(read_rows(source, {"x": "a", "y": "d"}))
        with pytest.raises(UserError, match=r"1 has no column 'c'.*set dataset.y"):
            list(read_rows(source, {"x": "a", "y": "c"}))
