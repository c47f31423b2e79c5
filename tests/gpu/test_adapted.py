"""LoRA adapters and fp8 on a GPU, with CUDA graphs: log-probabilities near those of transformers in fp32.

vLLM's LoRA kernels take fp16 and bf16 only, so tokens cannot be compared one by one as in `test_serving.py`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from mamba_hybrid.checkpoint import load_model

from ..vllm_plugin.conftest import HERE, environment  # noqa: F401  (a fixture)
from ..vllm_plugin.tiny_adapter import PROJECTIONS, merged, write_adapter
from ..vllm_plugin.tiny_hybrid import prompts, write_hybrid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    return write_hybrid(tmp_path_factory.mktemp("adapted") / "hybrid", "heads")


@pytest.fixture
def logprobs(hybrid, environment, tmp_path):  # noqa: F811
    """The engine's, of the prompts' own tokens, flat; each prompt under its adapter or None."""

    def run(asked, adapters, **llm) -> torch.Tensor:
        base = {
            "model": str(hybrid), "dtype": "float16", "max_model_len": 300, "max_num_seqs": 8,
            "gpu_memory_utilization": 0.05, "num_gpu_blocks_override": 2000, "enable_prefix_caching": False,
        }  # fmt: skip
        job = {"llm": base | llm, "prompts": asked, "adapters": [str(a) if a else None for a in adapters]}
        (tmp_path / "job.json").write_text(json.dumps(job))
        done = subprocess.run(
            [sys.executable, str(HERE / "logprobs_run.py"), str(tmp_path / "job.json"), str(tmp_path / "result.json")],
            env=environment, capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return torch.tensor([p for row in json.loads((tmp_path / "result.json").read_text()) for p in row])

    return run


def expected(models, asked) -> torch.Tensor:
    """The same by transformers in fp32."""
    ours = []
    with torch.no_grad():
        for model, prompt in zip(models, asked, strict=True):
            rows = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
            ours.append(rows.gather(1, torch.tensor(prompt)[1:, None])[:, 0])
    return torch.cat(ours)


def test_adapters_in_one_batch(hybrid, logprobs, tmp_path):
    adapter, asked = write_adapter(tmp_path / "a", hybrid, PROJECTIONS, seed=1), prompts([9] * 32, seed=3)
    adapters = [adapter, None] * 16
    models = {adapter: merged(hybrid, adapter), None: load_model(hybrid)}
    got = logprobs(asked, adapters, enable_lora=True, max_lora_rank=8)
    right = (got - expected([models[a] for a in adapters], asked)).abs().median()
    swapped = (got - expected([models[a] for a in reversed(adapters)], asked)).abs().median()
    assert right < swapped / 5, (right, swapped)


@pytest.mark.parametrize("how", ["fp8", "fp8_per_channel"])
def test_fp8(hybrid, logprobs, how, tmp_path):
    asked = prompts([9] * 32, seed=3)
    got = logprobs(asked, [None] * 32, quantization=how)
    another = load_model(write_hybrid(tmp_path / "another", "shared"))
    near = (got - expected([load_model(hybrid)] * 32, asked)).abs().median()
    far = (got - expected([another] * 32, asked)).abs().median()
    assert near < far / 5, (near, far)
