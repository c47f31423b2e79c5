"""Tokens under a LoRA adapter are those of the weights it is merged into, and tokens without one the base model's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mamba_hybrid.checkpoint import load_model

from .tiny_adapter import ATTENTION, MLP, PROJECTIONS, STEERING, merged, write_adapter
from .tiny_hybrid import prompts, reference, write_hybrid

pytestmark = pytest.mark.slow

NEW = 12


@pytest.fixture
def compare(start_engine, tmp_path):
    """Asks an engine for each prompt under its adapter (None for none), twice, and transformers with merged weights."""

    def run(hybrid: Path, asked: list[list[int]], adapters: list[Path | None], environment: dict[str, str], **llm):
        models = {None: load_model(hybrid)} | {a: merged(hybrid, a) for a in adapters if a}
        answers = [reference(models[a], prompt, NEW) for prompt, a in zip(asked, adapters, strict=True)]
        assert min(gap for _, gap in answers) > 1e-3
        plain = [reference(models[None], prompt, NEW)[0] for prompt in asked]
        changed = [tokens != base for (tokens, _), base in zip(answers, plain, strict=True)]
        assert changed == [a is not None for a in adapters]
        base = {
            "model": str(hybrid), "dtype": "float32", "max_model_len": 400, "max_num_seqs": 4,
            "max_num_batched_tokens": 200, "enforce_eager": True, "disable_log_stats": False, "enable_lora": True,
            "max_lora_rank": 8,
        }  # fmt: skip
        job = {"llm": base | llm, "prompts": asked, "new": NEW, "rounds": 2}
        job["adapters"] = [str(a) if a else None for a in adapters]
        done = start_engine(job, tmp_path, **environment)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        result = json.loads((tmp_path / "result.json").read_text())
        assert result["rounds"] == [[tokens for tokens, _ in answers]] * 2
        return result

    return run


def test_each_request_has_its_own_adapter(hybrids, compare, tmp_path):
    """Four adapters for two places, one request in three without any; prompts that are the same up to their end
    under different adapters, with prefix caching, which must tell them apart."""
    hybrid = hybrids["shared"]
    targets = {"all": PROJECTIONS, "attention": ATTENTION, "mlp": MLP, "steering": STEERING}
    made = {n: write_adapter(tmp_path / n, hybrid, t, seed=i, strength=0.5) for i, (n, t) in enumerate(targets.items())}
    short, long = prompts([1, 17, 40, 64, 100, 130], seed=3), prompts([300], seed=4)[0]
    adapters = [made.get(n) for n in ("all", "none", "attention", "mlp", "none", "steering", "none", "all", "steering")]
    result = compare(hybrid, [*short, long, long[:299], long[:290]], adapters, {}, max_loras=2, max_cpu_loras=4)
    assert result["counters"]["prefix_cache_hits"] > 0


def test_uneven_widths_on_two_devices(compare, tmp_path):
    """Keys half as wide as values, in a layer of our own, cut between two processes."""
    hybrid = write_hybrid(tmp_path / "hybrid", "paper", state_size=16, ssm_rope=False)
    mixers = write_adapter(tmp_path / "mixers", hybrid, PROJECTIONS, seed=1, layers=".mixer.")
    adapters = [mixers, None, mixers, None]
    two = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    compare(hybrid, prompts([17, 65, 130, 221], seed=9), adapters, two, tensor_parallel_size=2)
