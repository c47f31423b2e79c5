import json

import numpy as np
import pytest
import torch

from mamba_hybrid.errors import UserError
from tests.tiny import tokenizer
from torchtune_recipes import documents as documents_module
from torchtune_recipes import stream as stream_module
from torchtune_recipes.data import chat_dataset, text_dataset
from torchtune_recipes.distill_hybrid import DistillHybrid, run

from .conftest import metrics, start
from .test_data import TALK, chatty, write
from .test_distill_hybrid import SAME, same


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "AT_ONCE", 4)
    monkeypatch.setattr(stream_module, "UNSHUFFLED", 3)
    rng = np.random.default_rng(0)
    return write(
        tmp_path / "t.jsonl", [{"text": "".join(rng.choice(list("abcdef"), n))} for n in rng.integers(0, 70, 40)]
    )


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_unshuffled_stream_is_the_data_in_memory(source, tmp_path):
    talks = write(tmp_path / "c.jsonl", [{"messages": TALK[: 2 + 2 * (i % 2)]} for i in range(20)])
    for make, data in ((text_dataset, source), (chat_dataset, talks)):
        memory = make(chatty(), data, 16)
        stream = make(chatty(), data, 16, streaming=True, shuffle_buffer=1)
        numbers = np.arange(
            len(memory) - 1
        )  # in memory the last row is padded, a stream goes on with the first document
        for rows in np.array_split(numbers, 7):
            assert equal(stream.batch(rows), memory.batch(rows))
        assert stream.valid(numbers) == memory.valid(numbers)


def test_a_stream_goes_round(source):
    stream = text_dataset(tokenizer(), source, 16, streaming=True, shuffle_buffer=1)
    memory = text_dataset(tokenizer(), source, 16)
    tokens = memory.tokens_RL.ravel()[: int((memory.documents_RL >= 0).sum())]
    size = int(sum(len(ids) for ids, _ in stream._documents.begin()))
    rows = 3 * size // 16
    stream = text_dataset(tokenizer(), source, 16, streaming=True, shuffle_buffer=1)
    got = torch.cat([stream.batch(np.array([row])).tokens[0] for row in range(rows)]).numpy()
    assert np.array_equal(got, np.tile(tokens[:size], 4)[: rows * 16])
    order = stream.order(1, 1, seed=0)
    assert order.epoch(0) == 0 and order.epoch(rows - 1) == 2


@pytest.mark.parametrize("buffer", [1, 5, 8])
def test_every_step_can_be_resumed_exactly(source, buffer):
    def make():
        data = text_dataset(tokenizer(), source, 16, streaming=True, shuffle_buffer=buffer)
        return data, data.order(2, 2, seed=3)

    data, order = make()
    batches, places = [], []
    for step in range(40):  # several times round
        places.append(json.dumps(data.place(step * order.rows_per_step)))
        batches.append([data.batch(rows) for rows in order.micro_batches(step)])
    for step in (0, 1, 7, 18, 39):
        other, again = make()
        other.resume(step * again.rows_per_step, json.loads(places[step]))
        for at in range(step, min(step + 9, 40)):
            valid = other.valid(again.step_rows(at))
            assert valid == sum(int((b.labels != -100).sum()) for b in batches[at])
            for rows, expected in zip(again.micro_batches(at), batches[at], strict=True):
                assert equal(other.batch(rows), expected)


def test_shuffling_is_within_blocks_and_follows_the_seed(source):
    data = text_dataset(tokenizer(), source, 16, streaming=True, shuffle_buffer=12)
    one, other = (data.order(4, 1, seed=s) for s in (1, 2))
    rows = np.concatenate([one.step_rows(step).ravel() for step in range(6)])
    assert sorted(rows[:12]) == list(range(12)) and sorted(rows[12:]) == list(range(12, 24))
    assert rows[:12].tolist() != list(range(12)) and (rows[12:] - 12).tolist() != rows[:12].tolist()
    assert not np.array_equal(other.step_rows(0), one.step_rows(0))
    two = [data.order(2, 1, seed=1, rank=rank, processes=2) for rank in range(2)]
    for step in range(6):
        dealt = np.concatenate([next(order.micro_batches(step)) for order in two])
        assert np.array_equal(dealt, one.step_rows(step).ravel())


def test_digest_tells_settings_and_data_apart(source, tmp_path):
    def digest(data=source, length=16, **more):
        return text_dataset(tokenizer(), data, length, streaming=True, **more).digest()

    other = write(tmp_path / "other.jsonl", [{"text": "abc"}])
    kinds = [digest(), digest(shuffle_buffer=7), digest(length=15), digest(other), digest(max_tokens=100)]
    assert len(set(kinds)) == 5 and digest() == kinds[0]


def test_what_a_stream_refuses(tmp_path, source):
    (tmp_path / "none.jsonl").write_text("\n")
    silent = write(tmp_path / "silent.jsonl", [{"messages": TALK[:1]}])
    for make, data, more, says in (
        (text_dataset, str(tmp_path / "none.jsonl"), {}, "no tokens"),
        (text_dataset, source, {"shuffle_buffer": 0}, "shuffle_buffer 0 must be"),
        (chat_dataset, silent, {}, "no token of the data set is to be learnt"),
    ):
        with pytest.raises(UserError, match=says):
            make(chatty(), data, 16, streaming=True, **more)
    with pytest.raises(UserError, match="shuffle_buffer 9 is for streaming=True"):
        text_dataset(tokenizer(), source, 16, shuffle_buffer=9)
    stream = text_dataset(tokenizer(), source, 16, streaming=True)
    with pytest.raises(UserError, match="makes token 256, the model has 200"):
        stream.check_vocabulary(200)
    bad = write(tmp_path / "bad.jsonl", [{"text": "abcdefgh"}] * 30 + [{"text": 3}])
    stream = text_dataset(tokenizer(), bad, 16, streaming=True, shuffle_buffer=2)
    with pytest.raises(UserError, match="line 31: column 'text' holds int"):
        for row in range(30):
            stream.batch(np.array([row]))


def streamed(models, **more) -> dict:
    parts = [
        {"weight": weight, "dataset": {"_component_": "torchtune_recipes.data.text_documents", "source": source}}
        for weight, source in ((2, str(models / "text.jsonl")), (1, str(models / "text.jsonl")))
    ]
    return {
        "dataset._component_": "torchtune_recipes.data.mixed_dataset", "dataset.parts": parts,
        "dataset.streaming": True, "dataset.shuffle_buffer": 10, "max_steps": 12, **more,
    }  # fmt: skip


WITHOUT = ("dataset.source", "dataset.column")


def test_one_process_resumed_and_two_have_the_same_losses(config, overrides, models, tmp_path):
    def cfg(**more):
        made = config(**streamed(models), **more)
        for key in WITHOUT:
            del made.dataset[key.removeprefix("dataset.")]
        return made

    assert run(cfg(output_dir=str(tmp_path / "whole"))) == 0
    whole = metrics(tmp_path / "whole")
    assert whole[-1]["epoch"] == 0 and len(whole) == 12
    # stopped in the middle of a block, then resumed
    recipe = DistillHybrid(cfg())
    recipe.setup()
    try:
        for recipe.step in range(7):
            recipe._unread.append(recipe.train_step())
        recipe.step = 7
        recipe.save_checkpoint()
    finally:
        recipe.cleanup()
    assert run(cfg()) == 0
    assert same(metrics(tmp_path / "run")) == same(whole)
    # two processes, from the command line
    more = streamed(models, output_dir=str(tmp_path / "two"), batch_size=2)
    more = {key: value for key, value in overrides(**more).items() if key not in WITHOUT}
    process = start(more, "--nproc_per_node", "2", without=WITHOUT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    for row, expected in zip(metrics(tmp_path / "two"), whole, strict=True):
        for key in SAME:
            assert row[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-4)


def test_a_bad_row_far_on_loses_no_step(config, models, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "AT_ONCE", 4)
    rows = (models / "text.jsonl").read_text().splitlines()
    data = tmp_path / "data.jsonl"
    settings = {
        "dataset.source": str(data), "dataset.streaming": True, "dataset.shuffle_buffer": 8, "max_steps": 12,
    }  # fmt: skip
    data.write_text("".join(row + "\n" for row in rows))
    assert run(config(output_dir=str(tmp_path / "whole"), **settings)) == 0
    broken = [*rows[:9], '{"text": 3}', *rows[10:]]
    data.write_text("".join(row + "\n" for row in broken))
    assert run(config(**settings)) == 1
    steps = len(metrics(tmp_path / "run"))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"data.jsonl, line 10: column 'text' holds int, not text (step {steps} is saved)" in error
    assert 0 < steps < 12 and (tmp_path / "run" / f"step_{steps}").is_dir()
    data.write_text("".join(row + "\n" for row in rows))
    assert run(config(**settings)) == 0
    assert same(metrics(tmp_path / "run")) == same(metrics(tmp_path / "whole"))


@pytest.mark.parametrize("steps", [{"epochs": 1, "max_steps": None}, {"epochs": 1, "max_steps": 5}])
def test_a_stream_has_no_epochs(config, capsys, tmp_path, steps):
    assert run(config(**{"dataset.streaming": True, **steps})) == 1
    assert (
        "error: epochs 1 needs a data set of known length, a stream has none; set max_steps" in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()
