"""The shipped configurations of recipes: keys, components and their arguments, headers. And the pipelines of them."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torchtune.config._utils import _get_component_from_path

from mamba_hybrid.errors import UserError
from mamba_hybrid.pipeline import load as load_pipeline
from torchtune_recipes.align_hybrid import AlignHybrid
from torchtune_recipes.distill_hybrid import DistillHybrid
from torchtune_recipes.dpo_hybrid import DpoHybrid
from torchtune_recipes.recipe import component
from torchtune_recipes.select_layers import SelectLayers

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").glob("*.yaml"))
PIPELINES = [path for path in FILES if "steps" in OmegaConf.load(path)]
CONFIGS = [path for path in FILES if path not in PIPELINES]
RECIPES = {
    "align_hybrid": AlignHybrid,
    "distill_hybrid": DistillHybrid,
    "dpo_hybrid": DpoHybrid,
    "select_layers": SelectLayers,
}


def command(path) -> re.Match:
    """The header's command that runs this file."""
    header = path.read_text().split("\n\n")[0]
    found = re.search(rf"tune run (--nproc_per_node \d+ )?(\w+) --config configs/{path.name}$", header, re.MULTILINE)
    assert found and found[2] in RECIPES, header
    return found


def load(path, **overrides):
    cfg = OmegaConf.load(path)
    for key, value in overrides.items():
        OmegaConf.update(cfg, key, value)
    return cfg


def components(node):
    """All _component_ nodes, wherever they stand."""
    if OmegaConf.is_dict(node):
        if "_component_" in node:
            yield node
        for key in node:
            yield from components(node[key])
    elif OmegaConf.is_list(node):
        for item in node:
            yield from components(item)


def test_there_is_one_for_each_size():
    assert {"smollm2_135m_cpu", "smollm2_135m_align", "1b", "3b", "8b", "8b_align", "8b_dpo"} <= {
        p.stem for p in CONFIGS
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config(path, tmp_path):
    cfg = load(path, device="cpu", output_dir=str(tmp_path / "run"))
    recipe = RECIPES[command(path)[2]](cfg)  # checks every key
    assert recipe.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[cfg.dtype]
    nodes = list(components(cfg))
    assert len(nodes) >= 4
    for node in nodes:
        signature = inspect.signature(_get_component_from_path(node["_component_"]))
        signature.bind_partial(**{key: node[key] for key in node if key != "_component_"})
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = component("optimizer", cfg.optimizer, [{"params": [weight], "lr": 1.0, "initial_lr": 1.0}])
    schedule = component("lr_scheduler", cfg.lr_scheduler, optimizer, num_training_steps=500, last_epoch=0)
    assert 0 < schedule.get_last_lr()[0] <= 1
    for node in cfg.metric_loggers:
        logger = component("metric_loggers", node)
        logger.log_dict({"loss": 1.0}, 1)
        logger.close()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_header_says_how_to_run_it(path):
    header = path.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert command(path)
    assert "mamba-hybrid convert " in header and "Hardware:" in header and "Memory" in header
    cfg = OmegaConf.load(path)
    made = re.search(r"mamba-hybrid convert (\S+) (\S+) ", header)
    # what a stage starts from comes out of a command before it
    stages = [ROOT / name for name in re.findall(r"--config (configs/\w+\.yaml)$", header, re.MULTILINE)]
    results = [f"{OmegaConf.load(stage).output_dir}/hybrid" for stage in stages if stage != path]
    assert cfg.student in (made[2], *results)


def test_a_typing_error_in_a_component_is_found(tmp_path):
    cfg = load(CONFIGS[0], **{"optimizer.momentun": 0.1})
    with pytest.raises(UserError, match="momentun"):
        component("optimizer", cfg.optimizer, [torch.nn.Parameter(torch.ones(2))])


def test_torchtune_validates_them():
    tune = Path(sys.executable).parent / "tune"
    done = subprocess.run([tune, "validate", ROOT / "configs" / "8b.yaml"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "well-formed" in done.stdout, done.stderr


@pytest.mark.parametrize("path", PIPELINES, ids=lambda p: p.stem)
def test_pipeline(path, monkeypatch):
    """Its commands parse and its configurations have what it overrides; each step reads what earlier ones wrote."""
    header = path.read_text().split("\n\n")[0]
    assert f"mamba-hybrid run configs/{path.name}\n" in header and "Hardware:" in header
    monkeypatch.chdir(ROOT)
    pipeline = load_pipeline(Path("configs") / path.name)
    done: set[str] = set()
    for step in pipeline.steps:
        values = [word.partition("=")[2] or word for word in step.words]
        places = [
            Path(v).relative_to(pipeline.output_dir) for v in values if Path(v).is_relative_to(pipeline.output_dir)
        ]
        # a step writes to the place of its own name
        own = {place.parts[0] for place in places} - done
        assert {Path(name).stem for name in own} == {step.name}
        done |= own
        if step.words[0] == "tune":
            at = step.words.index("--config")
            cfg = OmegaConf.merge(OmegaConf.load(step.words[at + 1]), OmegaConf.from_dotlist(step.words[at + 2 :]))
            cfg.device = "cpu"
            RECIPES[step.words[at - 1]](cfg)
    assert {"compare.json", "compare"} & done


def test_there_are_pipelines():
    assert {"smollm2_135m_pipeline", "8b_pipeline"} <= {path.stem for path in PIPELINES}
