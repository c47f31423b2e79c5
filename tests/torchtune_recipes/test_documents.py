import itertools
import json

import pytest

from mamba_hybrid.errors import UserError
from tests.tiny import tokenizer
from torchtune_recipes import documents as documents_module
from torchtune_recipes.data import chat_documents, mixed_dataset, text_documents
from torchtune_recipes.documents import Mixture
from torchtune_recipes.source import RowReader

from .test_data import TALK, chatty, write


@pytest.fixture
def few_at_once(monkeypatch):
    """So that a source takes several groups of rows."""
    monkeypatch.setattr(documents_module, "AT_ONCE", 4)


def texts(path, prefix, lengths):
    return write(path, [{"text": (f"{prefix}{i}" * n)[:n]} for i, n in enumerate(lengths)])


def pieces(home):
    """A text source over two files, a conversation source, and a mixture of the two."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts(home / "1.jsonl", "a", range(1, 12))
    rows = pa.table({"text": ["b" * n for n in range(1, 10)]})
    pq.write_table(rows, home / "2.parquet", row_group_size=4)
    (home / "3.txt").write_text("the last")
    source = [str(home / name) for name in ("1.jsonl", "2.parquet", "3.txt")]
    talks = write(home / "chat.jsonl", [{"messages": TALK[: 2 + 2 * (i % 2)]} for i in range(7)])

    def text():
        return text_documents(chatty(), source)

    def chat():
        return chat_documents(chatty(), talks)

    return {
        "text": text,
        "limited": lambda: text_documents(chatty(), source, max_tokens=60),
        "chat": chat,
        "mixture": lambda: Mixture([text(), chat()], [2.0, 1.0]),
    }


@pytest.mark.parametrize("kind", ["text", "limited", "chat", "mixture"])
def test_documents_go_on_from_every_place(tmp_path, few_at_once, kind):
    make = pieces(tmp_path)[kind]
    whole = list(make().begin())
    assert len(whole) > 6
    if kind == "text":
        assert [len(ids) for ids, _ in whole] == [*(n + 1 for n in range(1, 12)), *(n + 1 for n in range(1, 10)), 9]
    for stop in range(len(whole) + 1):
        first, second = make(), make()
        assert list(itertools.islice(first.begin(), stop)) == whole[:stop]
        place = json.loads(json.dumps(first.place()))
        assert list(second.begin(place)) == whole[stop:]
    again = make()
    assert list(again.begin()) == list(again.begin()) == whole


def test_hub_stream_goes_on_where_it_was(tmp_path, monkeypatch):
    """A stream of the datasets library, without the hub."""
    import datasets

    texts(tmp_path / "a.jsonl", "a", range(1, 9))
    texts(tmp_path / "b.jsonl", "b", range(1, 9))
    real, files = datasets.load_dataset, [str(tmp_path / f"{name}.jsonl") for name in "ab"]

    def load(name, split, streaming):
        if name != "owner/corpus":
            raise FileNotFoundError(f"{name} is not on the hub")
        return real("json", data_files=files, split=split, streaming=streaming, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    expected = [value for file in files for _, value in RowReader(file, "text")]
    assert [v for _, v in RowReader("owner/corpus", "text")] == expected
    for stop in (0, 3, 8, 11, 16):
        first, second = (RowReader("owner/corpus", "text", streaming=True) for _ in range(2))
        head = list(itertools.islice(first.begin(), stop))
        place = json.loads(json.dumps(first.place()))
        tail = list(second.begin(place))
        assert [v for _, v in head + tail] == expected
        assert [where for where, _ in head + tail][-1] == "owner/corpus, row 16"
    with pytest.raises(UserError, match="the hub gives no split 'train' of it: owner/none is not"):
        RowReader("owner/none", "text", streaming=True)


def test_shares_of_a_mixture_follow_the_weights(tmp_path):
    sources = [texts(tmp_path / f"{c}.jsonl", c, [n] * 400) for c, n in (("a", 3), ("b", 11), ("c", 6))]
    weights = [5.0, 3.0, 2.0]
    mixture = Mixture([text_documents(tokenizer(), s, add_eos=False) for s in sources], weights, max_tokens=6000)
    seen = dict.fromkeys("abc", 0)
    for ids, _ in mixture.begin():
        seen["abc"[ids[0] - tokenizer()("a")["input_ids"][0]]] += len(ids)
        total = sum(seen.values())
        # at every moment, to a document of 11 tokens
        for name, weight in zip("abc", weights, strict=True):
            assert abs(seen[name] - total * weight / 10) <= 11, (name, total)
    assert 6000 <= total < 6011
    # the first is over after 1200 tokens: it was read again
    assert mixture.passes == [2, 0, 0] and mixture.tokens == list(seen.values())


def test_a_mixture_ends_when_every_part_was_read(tmp_path):
    small, large = texts(tmp_path / "s.jsonl", "s", [9] * 3), texts(tmp_path / "l.jsonl", "l", [9] * 40)
    parts = [text_documents(tokenizer(), source) for source in (small, large)]
    mixture = Mixture(parts, [1.0, 1.0])
    got = list(mixture.begin())
    assert mixture.passes == [13, 1] and sum(mixture.tokens) == 10 * len(got) == 10 * (41 + 40)
    endless = Mixture(parts, [1.0, 1.0], endless=True)
    assert len(list(itertools.islice(endless.begin(), 500))) == 500
    bounded = Mixture([text_documents(tokenizer(), large, max_tokens=50), parts[0]], [1.0, 1.0])
    list(bounded.begin())
    assert bounded.tokens[0] == 50


def test_mixed_rows(tmp_path):
    source, talks = texts(tmp_path / "a.jsonl", "a", [20] * 30), write(tmp_path / "c.jsonl", [{"messages": TALK}])
    text = {"_component_": "torchtune_recipes.data.text_documents", "source": source}
    chat = {"_component_": "torchtune_recipes.data.chat_documents", "source": talks}
    parts = [{"weight": 3, "dataset": text}, {"weight": 1, "dataset": chat}]
    rows = mixed_dataset(chatty(), parts, 64)
    assert rows.digest() == mixed_dataset(chatty(), parts, 64).digest()
    learnt = chatty().decode(rows.tokens_RL[rows.counted_RL])
    assert "a0a0" in learnt and "four" in learnt and "two and two" not in learnt
    share = 30 * 21 / rows.tokens_RL.size
    assert 0.7 < share < 0.8


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([], "dataset.parts is empty"),
        (["a.jsonl"], r"dataset.parts\[0\] 'a.jsonl' needs weight and dataset"),
        ([{"weight": 0, "dataset": {}}], r"dataset.parts\[0\].weight 0 must be a number above 0"),
        ([{"wieght": 1}], r"unknown config key dataset.parts\[0\].wieght"),
        ([{"weight": 1, "dataset": "a.jsonl"}], r"dataset.parts\[0\].dataset needs a _component_"),
        ([{"weight": 1, "dataset": {"_component_": "torchtune_recipes.data.text_dataset"}}], "missing a required"),
        (
            [{"weight": 1, "dataset": {"_component_": "torchtune_recipes.data.load_tokenizer"}}],
            "unexpected keyword argument 'streaming'",
        ),
    ],
)
def test_bad_parts(parts, says):
    with pytest.raises(UserError, match=says):
        mixed_dataset(tokenizer(), parts, 8)


def test_part_without_tokens(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    source = texts(tmp_path / "a.jsonl", "a", [5])
    parts = [text_documents(tokenizer(), s) for s in (source, str(tmp_path / "empty.jsonl"))]
    with pytest.raises(UserError, match=r"dataset.parts\[1\] has no tokens"):
        list(Mixture(parts, [1.0, 1.0]).begin())
