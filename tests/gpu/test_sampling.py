"""Speculation does not change what is sampled: second tokens after a prompt against the model's own probabilities."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from scipy.stats import chisquare

from mamba_hybrid.checkpoint import load_model, save_model

from ..vllm_plugin.conftest import HERE, environment  # noqa: F401  (fixture)
from ..vllm_plugin.tiny_hybrid import VOCAB, prompts, write_hybrid, write_noisy

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
SAMPLES = int(os.environ.get("SAMPLES", "200000"))
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 1, "prompt_lookup_min": 1}


@pytest.fixture(scope="module")
def smooth(tmp_path_factory):
    """A hybrid whose next token is often not the best one, and the probabilities of a prompt's second next token."""
    base = tmp_path_factory.mktemp("smooth")
    model = load_model(write_hybrid(base / "sharp", "heads"))
    with torch.no_grad():
        model.lm_head.weight.mul_(0.25)
    save_model(base / "smooth", model.config, model.state_dict().items(), base / "sharp")
    prompt = prompts([40], seed=4)[0]
    with torch.no_grad():
        first = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        after = torch.tensor([[*prompt, token] for token in range(VOCAB)])
        rows = [model(after[at : at + 64]).logits[:, -1].softmax(-1) for at in range(0, VOCAB, 64)]
    return base / "smooth", prompt, (first.double() @ torch.cat(rows).double()).tolist()


@pytest.mark.parametrize("drafts", ["none", "ngram", "draft"])
def test_second_tokens_are_the_models(smooth, environment, tmp_path, drafts):  # noqa: F811
    path, prompt, probabilities = smooth
    speculative = {"none": None, "ngram": NGRAM}.get(drafts)
    if drafts == "draft":
        draft = write_noisy(tmp_path / "draft", path, 0.03)
        speculative = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 4}
    assert max(probabilities) < 0.5 and sum(p > 1 / SAMPLES for p in probabilities) > 100, "no tail"
    llm = {
        "model": str(path), "dtype": "float32", "max_model_len": 700, "max_num_seqs": 128, "disable_log_stats": False,
        "enforce_eager": True, "enable_prefix_caching": False, "gpu_memory_utilization": 0.2,
        "speculative_config": speculative,
    }  # fmt: skip
    job = {"llm": llm, "prompt": prompt, "samples": SAMPLES, "vocab": VOCAB}
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, str(HERE / "sample_run.py"), str(tmp_path / "job.json"), str(tmp_path / "result.json")],
        env=environment | {"VLLM_USE_FLASHINFER_SAMPLER": "0", "TRITON_F32_DEFAULT": "ieee"},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert sum(result["counts"]) == SAMPLES
    if speculative:
        accepted, drafted = (result["counters"][f"spec_decode_num_{kind}_tokens"] for kind in ("accepted", "draft"))
        assert accepted < drafted and (accepted > 0 or drafts == "ngram")
    # rare tokens together, so that each bin expects at least five
    bins = [(n, p * SAMPLES) for n, p in zip(result["counts"], probabilities, strict=True)]
    common = [b for b in bins if b[1] >= 5]
    rare = [b for b in bins if b[1] < 5]
    bins = common + ([(sum(n for n, _ in rare), sum(e for _, e in rare))] if rare else [])
    observed, expected = [n for n, _ in bins], [e for _, e in bins]
    scale = SAMPLES / sum(expected)
    p = chisquare(observed, [e * scale for e in expected]).pvalue
    print(f"{SAMPLES} samples, {len(observed)} bins, chi-square p = {p:.3f}")
    assert p > 0.01
