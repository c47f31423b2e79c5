"""Tiny checkpoints, and vLLM in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from .tiny_hybrid import KINDS, write_hybrid

HERE = Path(__file__).parent


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny tensors are ten times faster without the thread pool."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def hybrids(tmp_path_factory) -> dict[str, Path]:
    """Directory of each kind of tiny hybrid."""
    base = tmp_path_factory.mktemp("hybrids")
    return {kind: write_hybrid(base / kind, kind) for kind in KINDS}


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """For processes that run vLLM."""
    ours = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # tests hand functions to the worker
        "VLLM_NO_USAGE_STATS": "1",
        # tiny tensors again: one thread, wherever there is room for it
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "PYTHONPATH": os.pathsep.join(p for p in (str(HERE), os.environ.get("PYTHONPATH")) if p),
    }
    return dict(os.environ) | ours


# For processes that are an engine of one worker on a CPU: vLLM starts no others, each of which imports all anew.
# Servers, `generate`, engines of several workers and those on GPUs are tested as users start them.
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@pytest.fixture(scope="session")
def start_engine(environment) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs engine_run.py on a job."""

    def start(job: dict, folder: Path, **extra_environment: str) -> subprocess.CompletedProcess[str]:
        (folder / "job.json").write_text(json.dumps(job))
        several = any(job["llm"].get(f"{kind}_parallel_size", 1) > 1 for kind in ("tensor", "pipeline"))
        return subprocess.run(
            [sys.executable, str(HERE / "engine_run.py"), str(folder / "job.json"), str(folder / "result.json")],
            env=environment | ({} if several or torch.cuda.is_available() else IN_PROCESS) | extra_environment,
            capture_output=True,
            text=True,
            timeout=500,
        )

    return start
