import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch._dynamo.utils import counters

from mamba_hybrid.convert import Conversion, convert
from tests.tiny import save_text, save_transformer

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "smollm2_135m_cpu.yaml"


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """Directory with a tiny tied `teacher`, the calibrated `hybrid` of it and `text.jsonl`."""
    home = tmp_path_factory.mktemp("distil")
    save_transformer(home / "teacher", "tied")
    save_text(home / "text.jsonl", words=6000)
    convert(
        Conversion(
            str(home / "teacher"), str(home / "hybrid"), calibrate=str(home / "text.jsonl"), tokens=1024, length=128,
            mixer={"window": 8},
        )
    )  # fmt: skip
    return home


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors are slower on many threads, and sums come out the same as in the processes started here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def compile_with(monkeypatch) -> Callable[[str], None]:
    """Lets torch.compile, and what calls it, use another backend than inductor, whose code takes minutes to make, with
    no graphs yet."""
    inductor = torch.compile

    def choose(backend: str) -> None:
        monkeypatch.setattr(torch, "compile", functools.partial(inductor, backend=backend))
        torch._dynamo.reset()
        counters.clear()

    return choose


@pytest.fixture
def overrides(models, tmp_path) -> Callable[..., dict]:
    """Overrides that make the shipped CPU configuration one of the tiny models."""

    def make(**more) -> dict:
        return {
            "student": str(models / "hybrid"),
            "teacher": str(models / "teacher"),
            "dataset.source": str(models / "text.jsonl"),
            "dataset.max_seq_len": 48,
            "output_dir": str(tmp_path / "run"),
            "batch_size": 4,
            "max_steps": 10,
            "freeze": [],
            "checkpoint_every_n_steps": None,
            "loss.chunk_tokens": 50,
            "lr_scheduler.num_warmup_steps": 2,
        } | more

    return make


@pytest.fixture
def config(overrides) -> Callable[..., DictConfig]:
    def make(**more) -> DictConfig:
        cfg = OmegaConf.load(CONFIG)
        for key, value in overrides(**more).items():
            OmegaConf.update(cfg, key, value)
        return cfg

    return make


def metrics(run: str | Path) -> list[dict]:
    """Rows of a run."""
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def branch(run: Path, step: int, out: Path) -> str:
    """A run as it stood after a checkpoint."""
    out.mkdir()
    shutil.copytree(run / f"step_{step}", out / f"step_{step}")
    shutil.copy(run / "metrics.jsonl", out)
    return str(out)


def start(
    overrides: dict,
    *launcher: str,
    cwd: Path = ROOT,
    recipe: str = "distill_hybrid",
    config: Path = CONFIG,
    without: tuple[str, ...] = (),
) -> subprocess.Popen:
    """`tune run` as a user types it, without some keys of the configuration."""
    # as YAML writes them
    words = [f"{key}={json.dumps(v) if v is None or isinstance(v, list) else v}" for key, v in overrides.items()]
    words += [f"~{key}" for key in without]
    tune = Path(sys.executable).parent / "tune"
    return subprocess.Popen(
        [tune, "run", *launcher, recipe, "--config", str(config), *words],
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def forked(recipe: str, processes: int, overrides: dict, without: tuple[str, ...] = ()) -> None:
    """A run of a recipe on several processes, for the price of one import."""
    words = [f"{key}={value}" for key, value in overrides.items()] + [f"~{key}" for key in without]
    command = [sys.executable, "-m", "tests.torchtune_recipes.forked_run", recipe, str(processes), str(CONFIG), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def stop_after(recipe, steps: int) -> None:
    """Train a recipe that is set up for so many steps, save, and end it there."""
    try:
        for _ in range(steps):
            recipe._unread.append(recipe.train_step())
            recipe.step += 1
        recipe.save_checkpoint()
    finally:
        recipe.cleanup()
