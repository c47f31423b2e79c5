import json

import numpy as np
import pytest
import torch

from mamba_hybrid.errors import UserError
from tests.tiny import tokenizer
from torchtune_recipes.chat import render, trained_tokens
from torchtune_recipes.data import chat_dataset, load_tokenizer, text_dataset
from torchtune_recipes.order import RowOrder
from torchtune_recipes.packing import PackedRows
from torchtune_recipes.source import read_rows

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [
    {"role": "user", "content": "two and two?"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "yes!"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def chatty(template=TEMPLATE):
    t = tokenizer()
    t.chat_template = template
    return t


def naive_labels(documents, length):
    """Label by label, from the definition."""
    flat = [(token, learnt, d) for d, (ids, mask) in enumerate(documents) for token, learnt in zip(ids, mask)]  # noqa: B905
    flat += [(0, False, -1)] * (-len(flat) % length)
    rows = [flat[i : i + length] for i in range(0, len(flat), length)]
    return [
        [
            row[t + 1][0] if t + 1 < length and row[t + 1][2] == row[t][2] and row[t + 1][1] else -100
            for t in range(length)
        ]
        for row in rows
    ]


def test_packing_labels_and_document_ids():
    rng = np.random.default_rng(0)
    documents = []
    for n in (3, 20, 1, 7, 9, 0, 5):
        documents.append((rng.integers(1, 99, n).tolist(), (rng.random(n) < 0.7).tolist()))
    rows = PackedRows(documents, 8)
    assert len(rows) == 6 and rows.length == 8
    batch = rows.batch(np.arange(len(rows)))
    assert batch.labels.tolist() == naive_labels(documents, 8)
    assert batch.tokens.flatten()[:45].tolist() == [t for ids, _ in documents for t in ids]
    # ids: 3 of the first, 5 of the second | 8 of it | 7 of it, 1 | 7, 1 | 8 | 5 and padding apart
    assert batch.documents.tolist() == [
        [0, 0, 0, 1, 1, 1, 1, 1],
        [0] * 8,
        [0, 0, 0, 0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0, 0, 0, 1],
        [0] * 8,
        [0, 0, 0, 0, 0, 1, 1, 1],
    ]
    assert rows.valid_R.tolist() == (batch.labels != -100).sum(1).tolist()
    moved = batch.to(torch.device("cpu"))
    assert moved.documents.ids_BL is batch.documents
    assert moved.documents.first_D1.tolist() == [0, 3, 8, 16, 23, 24, 31, 32, 40, 45, 48]
    chunks = list(moved.chunks(5))
    assert torch.equal(torch.cat([chunk.documents for chunk in chunks], 1), batch.documents)


def test_digest_changes_with_the_tokens_and_with_what_is_learnt():
    digests = {
        PackedRows([(ids, mask)], 4).digest()
        for ids, mask in (([1, 2, 3, 4], None), ([1, 2, 4, 3], None), ([1, 2, 3, 4], [True] * 3 + [False]))
    }
    assert len(digests) == 3


def test_text_ends_with_eos_and_learns_it(tmp_path):
    t = tokenizer()
    source = write(tmp_path / "t.jsonl", [{"text": "abc"}, {"text": "de"}])
    batch = text_dataset(t, source, 7).batch(np.array([0]))
    assert t.decode(batch.tokens[0]) == "abc<|end|>de<|end|>"
    assert t.decode(batch.labels[0][batch.labels[0] != -100]) == "bc<|end|>e<|end|>"
    without = text_dataset(t, source, 5, add_eos=False).batch(np.array([0]))
    assert t.decode(without.tokens[0]) == "abcde"
    assert len(text_dataset(t, source, 2, max_tokens=2)) == 2  # the first document only


def test_chat_learns_what_the_assistant_says(tmp_path):
    t = chatty()
    source = write(tmp_path / "c.jsonl", [{"messages": TALK}])
    batch = chat_dataset(t, source, 100).batch(np.array([0]))
    assert t.decode(batch.labels[0][batch.labels[0] != -100]) == "four<|end|>yes!<|end|>"
    everything = chat_dataset(t, source, 100, train_on_prompt=True).batch(np.array([0]))
    text = t.apply_chat_template(TALK, tokenize=False)
    assert t.decode(everything.labels[0][everything.labels[0] != -100]) == text.removeprefix("<|user|>")


def test_trained_tokens():
    offsets = [(0, 2), (2, 2), (2, 5), (5, 6), (6, 9), (9, 9)]
    assert trained_tokens(offsets, [range(2, 5), range(6, 9)]) == [False, True, True, False, True, False]


def test_a_template_that_rewrites_earlier_turns_is_refused():
    forgetful = "{% for m in messages[-2:] %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    with pytest.raises(UserError, match=r"row 1: the chat template changes earlier turns.*train_on_prompt=true"):
        render("row 1", TALK, chatty(forgetful))
    assert render("row 1", TALK, chatty(forgetful), everything=True)[0].startswith("<|user|>sure?")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"text": "a"}, {"body": "b", "id": 3}], r"line 2 has no column 'text', only \['body', 'id'\]"),
        ([{"text": 3}], "column 'text' holds int, not text"),
        ([["text"]], "line 1 is a list"),
        ([], "the data set has no tokens"),
    ],
)
def test_bad_text_rows(tmp_path, rows, says):
    with pytest.raises(UserError, match=says):
        text_dataset(tokenizer(), write(tmp_path / "t.jsonl", rows), 8)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("hello", "is no conversation"),
        ([], "is no conversation"),
        ([{"content": "x"}], "message without a role"),
        ([{"role": "user", "content": None}], "without text"),
        ([{"role": "user", "content": "x"}], "no token of the data set is to be learnt"),
    ],
)
def test_bad_conversations(tmp_path, messages, says):
    with pytest.raises(UserError, match=says):
        chat_dataset(chatty(), write(tmp_path / "c.jsonl", [{"messages": messages}]), 32)


def test_sources(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.txt").write_text("one\ntwo")
    pq.write_table(pa.table({"text": ["three", "four"], "id": [1, 2]}), tmp_path / "b.parquet")
    jsonl = write(tmp_path / "c.jsonl", [{"text": "five"}])

    def values(source):
        return [value for _, value in read_rows(source, "text")]

    assert values(str(tmp_path / "a.txt")) == ["one\ntwo"]
    assert values(str(tmp_path / "b.parquet")) == ["three", "four"]
    assert values([str(tmp_path / "*.parquet"), jsonl]) == ["three", "four", "five"]
    (tmp_path / "broken.jsonl").write_text('{"text": "x"}\n{"text": ')
    (tmp_path / "broken.parquet").write_text("no parquet")
    for source, says in {
        "none.jsonl": "does not exist",
        "*.jsonlx.txt": "matches no file",
        "broken.jsonl": "line 2 is no JSON",
        "broken.parquet": "cannot be read",
        "b.parquet": "no column 'messages', only",
    }.items():
        with pytest.raises(UserError, match=says):
            list(read_rows(str(tmp_path / source), "messages" if source == "b.parquet" else "text"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="is none of"):
        list(read_rows(str(tmp_path / "folder"), "text"))


def test_tokenizer_of_nothing(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match="has no tokenizer"):
            load_tokenizer(str(path))
    bare = tokenizer()
    bare.chat_template = bare.eos_token = None
    with pytest.raises(UserError, match="add_eos=false"):
        text_dataset(bare, write(tmp_path / "t.jsonl", [{"text": "a"}]), 8)
    with pytest.raises(UserError, match="no chat template"):
        chat_dataset(bare, write(tmp_path / "c.jsonl", [{"messages": TALK}]), 8)


def test_order_is_one_global_order_however_it_is_dealt():
    one = RowOrder(50, 4, 2, seed=3)
    two = [RowOrder(50, 2, 2, seed=3, rank=r, processes=2) for r in range(2)]
    assert one.steps_per_epoch == two[0].steps_per_epoch == 6
    seen = []
    for step in range(12):
        whole = list(one.micro_batches(step))
        dealt = [np.concatenate(parts) for parts in zip(*(o.micro_batches(step) for o in two), strict=True)]
        assert np.array_equal(whole, dealt)
        seen.append(np.concatenate(whole))
    for epoch in (seen[:6], seen[6:]):
        assert len(set(np.concatenate(epoch))) == 48
    assert not np.array_equal(np.concatenate(seen[:6]), np.concatenate(seen[6:]))
    # any step without the ones before
    assert np.array_equal(RowOrder(50, 4, 2, seed=3).step_rows(7).ravel(), seen[7])
    assert not np.array_equal(RowOrder(50, 4, 2, seed=4).step_rows(0).ravel(), seen[0])
    with pytest.raises(UserError, match=r"7 packed rows, a step takes 8 \(batch_size 4"):
        RowOrder(7, 4, 2, seed=0)


def test_label_dtypes_are_the_models():
    batch = PackedRows([([1, 2, 3], None)], 4).batch(np.array([0]))
    assert {t.dtype for t in batch} == {torch.int64}
