"""A server that says it is ready has compiled the mixers' kernels: no prompt waits for a compiler."""

from __future__ import annotations

import json
import re

import pytest
import torch

from ..vllm_plugin.conftest import environment, start_engine  # noqa: F401  (fixtures)
from ..vllm_plugin.tiny_hybrid import prompts, write_hybrid, write_noisy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
OURS = {"_near", "_states", "_outputs", "_write", "_verify", "_readout"}
DRAFTERS = {"_prepare_prefill_inputs_kernel"}  # vLLM's, of a draft model


@pytest.mark.parametrize("method", [None, "ngram", "draft_model"])
def test_prompts_of_all_lengths_find_their_kernels(start_engine, tmp_path, method):  # noqa: F811
    model = write_hybrid(tmp_path / "hybrid", "heads", max_position_embeddings=8192)
    llm = {
        "model": str(model), "dtype": "bfloat16", "max_model_len": 4400, "max_num_seqs": 32,
        "max_num_batched_tokens": 8192, "gpu_memory_utilization": 0.2, "disable_log_stats": False,
        "jit_monitor_verbose": True,
    }  # fmt: skip
    if method:
        llm["speculative_config"] = {"method": method, "num_speculative_tokens": 4}
    if method == "ngram":
        llm["speculative_config"] |= {"prompt_lookup_max": 2, "prompt_lookup_min": 1}
    if method == "draft_model":
        llm["speculative_config"]["model"] = str(write_noisy(tmp_path / "draft", model, 0.03))
    lengths = [2, 7, 40, 200, 900, 1500, 4000] + [11, 33] * 14
    job = {"llm": llm, "prompts": prompts(lengths, seed=0), "new": 20, "rounds": 1}
    # a cache of compiled kernels would hide what was compiled late
    switches = {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "VLLM_LOGGING_LEVEL": "INFO"}
    done = start_engine(job, tmp_path, VLLM_USE_V2_MODEL_RUNNER="1", **switches)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(json.loads((tmp_path / "result.json").read_text())["rounds"][0]) == len(lengths)
    log = done.stdout + done.stderr
    assert "Kernel JIT monitor activated" in log
    late = set(re.findall(r"JIT compilation during inference: (\w+)", log))
    assert not late & (OURS | DRAFTERS), late
