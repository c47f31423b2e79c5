"""Plans of a step against the step itself, on the CPU's path: what the allocator gave out, what the processes moved."""

import json
import random
import subprocess
import sys

import pytest
from omegaconf import DictConfig, OmegaConf
from torch.profiler import ProfilerActivity, profile

from mamba_hybrid.convert import Conversion, convert
from torchtune_recipes import activations
from torchtune_recipes.plan import read_config
from torchtune_recipes.stages import STAGES
from torchtune_recipes.traffic import Layout

from .conftest import ROOT
from .test_activations import OnCPU

FILES = {
    "distill_hybrid": "8b.yaml", "align_hybrid": "8b_align.yaml", "dpo_hybrid": "8b_dpo.yaml",
    "select_layers": "8b_select.yaml",
}  # fmt: skip
TEXT = {"_component_": "torchtune_recipes.data.text_dataset", "source": "", "column": "text", "max_seq_len": 0}
GREEDY = {"method": "greedy", "max_steps": 2}
AGAIN = {"enable_activation_checkpointing": True}


@pytest.fixture(scope="module")
def home(models, tmp_path_factory):
    """Pairs of answers, and the teacher with mixers only, beside `models`."""
    out = tmp_path_factory.mktemp("stages")
    convert(Conversion(str(models / "teacher"), str(out / "mixers"), keep=0.0, mixer={"window": 8}))
    rng = random.Random(0)
    pairs = [
        {"prompt": "a", **{k: "".join(rng.choices("abc", k=40)) for k in ("chosen", "rejected")}} for _ in range(60)
    ]
    (out / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return out


@pytest.fixture
def config(models, home, tmp_path):
    """A shipped configuration, made one of the tiny models on a CPU."""

    def make(name: str, **more) -> DictConfig:
        cfg = OmegaConf.load(ROOT / "configs" / FILES[name])
        if name != "dpo_hybrid":
            cfg.dataset = TEXT
        own = {
            "distill_hybrid": {"loss.chunk_tokens": 128},
            "align_hybrid": {},
            "dpo_hybrid": {"dataset.split": "train", "dataset.prompt": "prompt", "chunk_tokens": 128},
            "select_layers": {"chunk_tokens": 128, "attention_layers": 2, "recall.pairs": 32},
        }[name]
        common = {
            "student": str(home / "mixers" if name == "select_layers" else models / "hybrid"),
            "teacher": str(models / "teacher"),
            "dataset.source": str(home / "pairs.jsonl" if name == "dpo_hybrid" else models / "text.jsonl"),
            "dataset.max_seq_len": 192, "batch_size": 4, "device": "cpu", "dtype": "fp32", "max_steps": 4,
            "epochs": None, "checkpoint_every_n_steps": None, "metric_loggers": [], "output_dir": str(tmp_path / "run"),
        }  # fmt: skip
        if name != "align_hybrid":
            common["enable_activation_checkpointing"] = False
        for key, value in (common | own | more).items():
            OmegaConf.update(cfg, key, value)
        return cfg

    return make


def stage_of(name: str, cfg: DictConfig, gpus: int = 1):
    layout = Layout(gpus, cfg.get("data_parallel_shard") or gpus, 8)
    return STAGES[name](cfg, read_config(cfg.student), read_config(cfg.teacher), layout)


def second_step(recipe) -> int:
    """Bytes that the CPU's allocator had given out at most over what it had before."""
    recipe.setup()
    try:
        recipe.train_step()  # which makes the optimiser's moments
        recipe.step += 1
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
            recipe.train_step()
    finally:
        recipe.cleanup()
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize(
    "name, more",
    [
        ("distill_hybrid", {}),
        ("align_hybrid", {}),
        ("dpo_hybrid", {}),
        ("dpo_hybrid", AGAIN),
        ("select_layers", {}),
        ("select_layers", AGAIN),
        ("select_layers", GREEDY),
    ],
)
def test_a_step_allocates_what_is_planned(config, monkeypatch, name, more):
    monkeypatch.setattr(activations, "OnGPU", OnCPU)
    cfg = config(name, **more)
    stage = stage_of(name, cfg)
    before = sum(stage.always().values()) + stage.root(stage.teacher)
    found = second_step(STAGES[name].recipe(cfg))
    assert stage.peak(4).total - before == pytest.approx(found, rel=0.05)


def test_processes_move_what_is_planned(config, tmp_path):
    """Two of them: what a step gathers and sums, unit by unit."""
    words, stages = [], []
    for name in STAGES:
        length = 200 if name == "dpo_hybrid" else 64  # a pair has to fit
        cfg = config(name, **{"batch_size": 1, "dtype": "bf16", "dataset.max_seq_len": length, "max_steps": 2})
        if name == "select_layers":
            cfg.recall.pairs = 4
        OmegaConf.save(cfg, tmp_path / f"{name}.yaml")
        words.append(f"{tmp_path / name}.yaml:{name}")
        stages.append(stage_of(name, cfg, 2))
    command = [sys.executable, "-m", "tests.torchtune_recipes.traffic_run", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name, stage in zip(STAGES, stages, strict=True):
        rows = json.loads((tmp_path / f"{name}.json").read_text())
        # the first argument of both is what comes, and 100 bytes are more than gates have
        gathered = [come for op, come, _ in rows if "allgather" in op and come > 100]
        summed = [sent for op, _, sent in rows if "reduce_scatter" in op and sent > 100]
        e = stage.exchange()
        assert (len(gathered), len(summed)) == (e.gathers, e.sums), name
        assert sum(gathered) == pytest.approx(e.gathered, rel=0.01), name
        assert sum(summed) == pytest.approx(e.summed, rel=0.01), name
