import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn

from mamba_hybrid.checkpoint import load_model, open_model, save_model
from mamba_hybrid.errors import UserError
from tests.tiny import save_transformer, tokenizer
from torchtune_recipes.data import load_tokenizer
from torchtune_recipes.dpo_hybrid import DpoHybrid, Scorer, preference_loss, run
from torchtune_recipes.models import PARTS, shard
from torchtune_recipes.preference import preference_dataset

from .conftest import ROOT, metrics, start, stop_after

CONFIG = ROOT / "configs" / "smollm2_135m_dpo.yaml"
DPO, IPO, SIMPO = (
    "torchtune.rlhf.loss.DPOLoss",
    "torchtune_recipes.preference_loss.IPOLoss",
    "torchtune_recipes.preference_loss.SimPOLoss",
)


def write_pairs(path: Path, number: int, seed: int) -> str:
    """The chosen answer ends in another word than the rejected one; the rest of them is the same."""
    rng = random.Random(seed)
    rows = []
    for _ in range(number):
        said = "so " + "".join(rng.choices("abcd", k=rng.randint(6, 14)))
        prompt = "".join(rng.choices("abcdefgh ", k=6))
        rows.append({"prompt": prompt, "chosen": said + " yes", "rejected": said + " nay"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", 160, seed=0)


@pytest.fixture
def overrides(models, pairs, tmp_path):
    """Overrides that make the shipped configuration one of the tiny models."""

    def make(**more) -> dict:
        return {
            "student": str(models / "hybrid"),
            "teacher": str(models / "teacher"),
            "dataset.source": pairs,
            "dataset.max_seq_len": 200,
            "output_dir": str(tmp_path / "run"),
            "batch_size": 4,
            "max_steps": 10,
            "checkpoint_every_n_steps": None,
            "chunk_tokens": 50,
            "lr_scheduler.num_warmup_steps": 2,
            "log_every": 1,
            "device": "cpu",
            "dtype": "fp32",
        } | more

    return make


@pytest.fixture
def config(overrides):
    def make(**more):
        cfg = OmegaConf.load(CONFIG)
        for key, value in overrides(**more).items():
            OmegaConf.update(cfg, key, value)
        return cfg

    return make


def ready(cfg) -> DpoHybrid:
    recipe = DpoHybrid(cfg)
    recipe.setup()
    return recipe


def conversations(recipe: DpoHybrid, step: int = 0) -> list[list[tuple[torch.Tensor, int]]]:
    """(tokens, where the answer begins) of the chosen and the rejected of each pair of a step, unpacked from its rows
    by the text alone: a conversation ends where the next user speaks."""
    t = tokenizer()
    found = []
    for row in recipe.data.tokens_RL[recipe.order.step_rows(step).ravel()]:
        text = t.decode(row[: len(row) - list(row[::-1] != 0).index(True)])  # zeros at the end are padding
        for said in text.split("<|user|>")[1:]:
            prompt = "<|user|>" + said[: said.index("<|assistant|>")] + "<|assistant|>"
            tokens = torch.tensor(t("<|user|>" + said)["input_ids"])
            found.append((tokens, len(t(prompt)["input_ids"])))
    return [found[i : i + 2] for i in range(0, len(found), 2)]


def plain_log_probs(model, pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """(P, 2) log-probabilities of the answers and their tokens: one conversation at a time, all logits."""
    log_probs, sizes = [], []
    for pair in pairs:
        for tokens, begin in pair:
            token = model(tokens[None]).logits[0].log_softmax(-1)[:-1].gather(-1, tokens[1:, None])[:, 0]
            log_probs.append(token[begin - 1 :].sum())
            sizes.append(len(tokens) - begin)
    return torch.stack(log_probs).view(-1, 2), torch.tensor(sizes).view(-1, 2)


def plain_loss(kind, policy, reference, sizes, beta, weight):
    """The papers' formulas, with the likelihood of the chosen answer per token."""
    if kind == SIMPO:
        losses = -F.logsigmoid(beta * (policy[:, 0] / sizes[:, 0] - policy[:, 1] / sizes[:, 1]) - 1.0)
    else:
        h = (policy[:, 0] - reference[:, 0]) - (policy[:, 1] - reference[:, 1])
        losses = -F.logsigmoid(beta * h) if kind == DPO else (h - 1 / (2 * beta)) ** 2
    return (losses - weight * policy[:, 0] / sizes[:, 0]).mean()


@pytest.mark.parametrize(
    ("kind", "reference", "weight"),
    [(DPO, "teacher", 0.0), (DPO, "student", 0.3), (IPO, "teacher", 0.3), (SIMPO, "teacher", 0.0)],
)
def test_loss_and_gradients_are_those_of_the_formula_without_packing(
    config, models, tmp_path, kind, reference, weight, monkeypatch
):
    path = models / "teacher"
    if kind == IPO:  # a teacher of another shape
        path = save_transformer(tmp_path / "teacher", hidden_size=96, num_hidden_layers=2)
    loss = {
        "loss": {"_component_": kind, "beta": 0.5}, "reference": reference, "sft_weight": weight, "teacher": str(path)
    }  # fmt: skip
    read = []
    monkeypatch.setattr(
        "torchtune_recipes.recipe.open_model", lambda p, d: read.append(Path(p).name) or open_model(p, d)
    )
    recipe = ready(config(**loss))
    assert read[1:] == ([] if kind == SIMPO else ["teacher" if reference == "teacher" else "hybrid"])
    try:
        batch = recipe.data.batch(recipe.order.step_rows(0).ravel())
        pairs = conversations(recipe)
        assert len(pairs) == len(batch.sizes) > len(batch.tokens)  # rows hold several pairs
        recipe.learn(batch, len(pairs))
        grads = {name: p.grad for name, p in recipe.student.model.named_parameters()}
    finally:
        recipe.cleanup()
    student, teacher = load_model(models / "hybrid"), load_model(path)
    policy, sizes = plain_log_probs(student, pairs)
    with torch.no_grad():
        references = {name: plain_log_probs(m, pairs)[0] for name, m in (("student", student), ("teacher", teacher))}
    expected = {name: plain_loss(kind, policy, r, sizes, 0.5, weight) for name, r in references.items()}
    expected[reference].backward()
    expected = {name: value.item() for name, value in expected.items()}
    for name, p in student.named_parameters():
        assert (grads[name] - p.grad).norm() <= 1e-3 * p.grad.norm(), name
    # what is logged
    assert run(config(**loss, max_steps=1)) == 0
    (row,) = metrics(tmp_path / "run")
    assert row["loss"] == pytest.approx(expected[reference], rel=1e-4)
    if kind != SIMPO:
        # the other model as the reference gives another loss
        other = expected["student" if reference == "teacher" else "teacher"]
        assert abs(row["loss"] - other) > 0.01
        rewards = 0.5 * (policy - references[reference]).detach()
    else:
        rewards = 0.5 * (policy / sizes).detach()
    margin = rewards[:, 0] - rewards[:, 1]
    for key, value in {
        "chosen_reward": rewards[:, 0],
        "rejected_reward": rewards[:, 1],
        "reward_margin": margin,
        "accuracy": (margin > 0).float(),
        "chosen_logp": policy[:, 0],
        "rejected_logp": policy[:, 1],
        "chosen_nll": -policy[:, 0] / sizes[:, 0],
    }.items():
        assert row[key] == pytest.approx(value.mean().item(), rel=1e-3, abs=2e-4), key
    assert row["pairs"] == len(pairs)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_reference_stays_what_it_was(config, dtype):
    """Of the student's own start, the first margins are 0, and the reference does not follow the student."""
    recipe = ready(config(dtype=dtype, reference="student", mixer_lr=1e-3, rest_lr=1e-3, lr_scheduler=None))
    try:
        batch = recipe.data.batch(recipe.order.step_rows(0).ravel())
        before = recipe.log_probs(recipe.teacher, batch)
        assert torch.equal(before, recipe.log_probs(recipe.student, batch).detach())
        recipe.train_step()
        recipe.step = 1
        assert torch.equal(recipe.log_probs(recipe.teacher, batch), before)
        assert not torch.equal(recipe.log_probs(recipe.student, batch), before)
    finally:
        recipe.cleanup()


def tune(models: Path, pairs: str, out: Path) -> Path:
    """The hybrid, after it has learnt to give either answer."""
    rows = preference_dataset(load_tokenizer(str(models / "hybrid")), pairs, 200, prompt="prompt")
    model = load_model(models / "hybrid").train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(30):
        batch = rows.batch(np.random.default_rng(step).integers(0, len(rows), 4))
        logits = model(batch.tokens, document_ids=batch.documents).logits.flatten(0, 1)[batch.positions]
        F.cross_entropy(logits, batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_model(out, model.config, model.state_dict().items(), models / "hybrid")
    return out


def test_preferences_are_learnt_and_the_chosen_answers_stay(config, models, pairs, tmp_path):
    """On held-out pairs, with the shipped loss and weights: margins rise, and the mean log-probability of the chosen
    answers falls by less than 0.1 nat a token. Without the likelihood of chosen answers it falls by more."""
    tuned = tune(models, pairs, tmp_path / "tuned")
    held = write_pairs(tmp_path / "held.jsonl", 40, seed=1)
    rows = preference_dataset(load_tokenizer(str(tuned)), held, 200, prompt="prompt")
    batch = rows.batch(np.arange(len(rows)))

    def log_probs(path) -> torch.Tensor:
        with torch.no_grad():
            return Scorer(load_model(path))(*batch, 500).view(-1, 2)

    before, change = log_probs(tuned), {}
    for name, more in {"shipped": {}, "without": {"sft_weight": 0.0}}.items():
        out = tmp_path / name
        paths = {"student": str(tuned), "teacher": str(tuned), "output_dir": str(out)}
        assert run(config(**paths, **more, max_steps=20, mixer_lr=3e-3, rest_lr=3e-3)) == 0
        row = metrics(out)[-1]
        assert row["accuracy"] > 0.95 and row["reward_margin"] > 1
        after = log_probs(out / "hybrid")
        assert ((after - before) @ torch.tensor([1.0, -1.0])).mean() > 10
        change[name] = float(((after - before) / batch.sizes)[:, 0].mean())
    print(f"nats a token that the chosen answers gain: {change}")
    assert change["shipped"] > -0.1 > change["without"], change


SAME = ("loss", "reward_margin", "accuracy", "chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp",
        "chosen_nll", "grad_norm", "pairs", "lr_mixer", "lr_rest")  # fmt: skip


def test_one_process_and_two_have_the_same_losses_and_a_run_goes_on_bit_for_bit(config, overrides, tmp_path):
    settings = {"mixer_lr": 3e-4, "rest_lr": 3e-4}
    two = start(
        overrides(output_dir=str(tmp_path / "two"), batch_size=2, **settings), "--nproc_per_node", "2",
        recipe="dpo_hybrid", config=CONFIG,
    )  # fmt: skip
    assert run(config(output_dir=str(tmp_path / "one"), **settings)) == 0
    said, err = two.communicate(timeout=300)
    assert two.returncode == 0, err
    a, b = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(a) == len(b) == 10
    for row, other in zip(a, b, strict=True):
        for key in SAME:
            assert other[key] == pytest.approx(row[key], rel=1e-3 if key == "grad_norm" else 1e-4, abs=1e-4), key
    # stopped after four of the ten steps
    out = tmp_path / "parts"
    recipe = ready(config(output_dir=str(out), **settings))
    stop_after(recipe, 4)
    assert run(config(output_dir=str(out), **settings)) == 0
    assert [[row[key] for key in SAME] for row in metrics(out)] == [[row[key] for key in SAME] for row in a]
    parts, whole = (load_file(tmp_path / name / "hybrid" / "model.safetensors") for name in ("parts", "one"))
    assert all(torch.equal(parts[name], weight) for name, weight in whole.items())


def test_recomputed_activations_an_offloaded_teacher_and_a_larger_batch_change_nothing(config):
    got = []
    for more in (
        {}, {"enable_activation_checkpointing": True, "offload_teacher": True},
        {"batch_size": 2, "gradient_accumulation_steps": 2},
    ):  # fmt: skip
        recipe = ready(config(**more))
        try:
            got.append(recipe.train_step()[0])
        finally:
            recipe.cleanup()
    assert torch.equal(got[1], got[0])
    torch.testing.assert_close(got[2], got[0], rtol=1e-4, atol=1e-5)


def test_only_the_reference_goes_to_host_memory(config, monkeypatch):
    """On a CPU both lie in one memory, so what FSDP is told is looked at."""
    told = []

    def spy(module, *args, **more):
        told.append(more.get("offload", False))
        shard(module, *args, **more)

    monkeypatch.setattr("torchtune_recipes.dpo_hybrid.shard", spy)
    ready(config(offload_teacher=True)).cleanup()
    assert told == [False, True]


def test_pairs_that_are_too_long_are_left_out_and_counted(config, capsys):
    recipe = ready(config(**{"dataset.max_seq_len": 56, "dataset.too_long": "drop"}))
    recipe.cleanup()
    lengths = recipe.data.dropped, int(recipe.data.valid_R.sum())
    assert min(lengths) > 0 and sum(lengths) == 160
    assert f"left out {lengths[0]} of 160 pairs, longer than dataset.max_seq_len 56" in capsys.readouterr().out


def test_other_settings_are_refused_on_resumption(config, capsys):
    assert run(config(max_steps=1)) == 0
    for key, value in {"reference": "student", "loss.beta": 0.2, "sft_weight": 0.0, "length_normalised": True}.items():
        assert run(config(**{"max_steps": 1, key: value})) == 1
        assert f"was written with {key.split('.')[0]} " in capsys.readouterr().err


BAD = {
    "no teacher": ({"teacher": None}, "lacks teacher, the reference; reference=student needs none"),
    "reference": ({"reference": "both"}, "reference 'both' is none of teacher, student"),
    "sft_weight": ({"sft_weight": -0.1}, "sft_weight -0.1 must be a number of at least 0"),
    "chunk": ({"chunk_tokens": 0}, "chunk_tokens 0 must be a whole number above 0"),
    "normalised": ({"length_normalised": "yes"}, "length_normalised 'yes' must be true, false or null"),
    "beta": ({"loss.beta": 0}, "loss.beta 0 must be a number above 0"),
    "freeze": ({"freeze": ["mpl"]}, "freeze names ['mpl']; there are embeddings"),
    "all frozen": ({"freeze": list(PARTS)}, "leaves nothing to train"),
    "loss": ({"loss": "dpo"}, "loss needs a _component_"),
    "loss's argument": ({"loss.betta": 0.1}, "'betta'"),
    "no loss": ({"loss": {"_component_": "torchtune.rlhf.loss.DPO"}}, "loss: torchtune.rlhf.loss.DPO"),
    "another loss": (
        {"loss": {"_component_": "torchtune.rlhf.loss.PPOLoss"}},
        "PPOLoss takes pi_old_logprobs, pi_logprobs, advantages",
    ),
    "no module": (
        {"loss": {"_component_": "fractions.Fraction"}},
        "loss: fractions.Fraction takes nothing; it must take policy",
    ),
    "data": (
        {"dataset": {"_component_": "torchtune_recipes.data.text_dataset", "column": "prompt"}},
        "text_dataset makes no rows for preferring; use torchtune_recipes.preference.preference_dataset",
    ),
    "column": (
        {"dataset.chosen": "best"},
        "has no column 'best', only ['chosen', 'prompt', 'rejected']; set dataset.c",
    ),
    "long pairs": ({"dataset.max_seq_len": 40}, "over dataset.max_seq_len 40; raise it, or set dataset.too_long=drop"),
    "too_long": ({"dataset.too_long": "cut"}, "dataset.too_long 'cut' is none of error, drop"),
    "typing error": ({"sft_wieght": 0.1}, "unknown config key sft_wieght"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case, config, pairs, capsys, tmp_path):
    more, says = BAD[case]
    cfg = config()
    if case == "data":
        cfg.dataset = {"source": pairs, "max_seq_len": 200}
    for key, value in more.items():
        OmegaConf.update(cfg, key, value, merge=key == "dataset")
    assert run(cfg) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and says in errors[0], errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "takes_reference"), [(DPO, True), ("torchtune.rlhf.loss.RSOLoss", True), (IPO, True), (SIMPO, False)]
)
def test_losses_that_can_be_named(name, takes_reference):
    loss, takes = preference_loss(OmegaConf.create({"_component_": name}))
    assert type(loss).__name__ == name.split(".")[-1] and takes == takes_reference


class MeanLoss(nn.Module):
    """As DPO's, but a mean over the pairs, which would be taken twice."""

    def forward(self, policy_chosen_logps, policy_rejected_logps):
        return (policy_rejected_logps - policy_chosen_logps).mean()


def test_a_loss_that_returns_something_else_is_refused():
    node = OmegaConf.create({"_component_": f"{__name__}.MeanLoss"})
    with pytest.raises(UserError, match="MeanLoss must return losses, chosen and rejected rewards"):
        preference_loss(node)
