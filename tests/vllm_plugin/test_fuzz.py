"""An engine under random arrivals, aborts, preemptions and draft lengths."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from mamba_hybrid.checkpoint import load_model

from .conftest import HERE
from .tiny_hybrid import VOCAB, prompts, reference, write_noisy

pytestmark = pytest.mark.slow
SECONDS = int(os.environ.get("FUZZ_SECONDS", "30"))


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_no_divergence_and_no_leaked_slot(hybrids, environment, tmp_path, runner):
    """V1 with drafts of random length, some wrong; V2, in Triton's interpreter, with a draft model that has mixers and
    drafts another number of tokens every few steps."""
    model = load_model(hybrids["heads"])
    # V2 is slow here: prompts that soon need another block
    lengths = {"V1": [1, 2, 17, 64, 65, 100, 114, 221, 240, 400], "V2": [1, 65, 221, 240, 250]}[runner]
    asked = prompts(lengths)
    answers = [reference(model, prompt, 48) for prompt in asked]
    assert min(gap for _, gap in answers) > 1e-3
    sequences = [prompt + tokens for prompt, (tokens, _) in zip(asked, answers, strict=True)]
    oracle = {"sequences": sequences, "vocab": VOCAB}
    (tmp_path / "oracle.json").write_text(json.dumps(oracle))
    llm = {
        "model": str(hybrids["heads"]), "dtype": "float32", "max_model_len": 460, "max_num_seqs": 4,
        "max_num_batched_tokens": 64, "enforce_eager": True, "disable_log_stats": False,
        "num_gpu_blocks_override": 7, "enable_prefix_caching": False,
        "speculative_config": {"method": "custom_class", "model": "oracle.Oracle", "num_speculative_tokens": 4},
    }  # fmt: skip
    switches = {"ORACLE_JOB": str(tmp_path / "oracle.json")}
    if runner == "V2":
        draft = write_noisy(tmp_path / "draft", hybrids["heads"], 0.03)
        speculative = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3}
        llm |= {"speculative_config": speculative, "worker_cls": "quick_choice.RoundWorker"}
        llm |= {"additional_config": {"mamba_hybrid": {"drafts": "when they pay"}}}
        llm["num_gpu_blocks_override"] = 10  # one is no one's, three each for three sequences, none to grow
        switches = {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{HERE / 'interpreted_triton'}:{HERE}"}
    job = {
        "llm": llm, "sequences": sequences, "lengths": [len(p) for p in asked], "seconds": SECONDS, "seed": 1,
        "arrivals": {"V1": 0.3, "V2": 1.0}[runner], "aborts": {"V1": 0.02, "V2": 0.1}[runner],
    }  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, str(HERE / "fuzz_run.py"), str(tmp_path / "job.json")],
        env=environment | switches,
        capture_output=True,
        text=True,
        timeout=4 * SECONDS + 300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    counts = {name: int(n) for name, n in re.findall(r"(\w+)'?:? (\d+)", done.stdout)}
    assert all(counts[name] > 0 for name in ("finished", "aborted", "preempted")), done.stdout[-300:]
