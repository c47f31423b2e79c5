"""What both ways into the engine check and set before vLLM, which takes half a minute to start and fails at length."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import PretrainedConfig

from mamba_hybrid.errors import UserError
from mamba_hybrid.source import open_source

from .version import refusal

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
KV_CACHE = "VLLM_CPU_KVCACHE_SPACE"


def check_servable(path: str) -> PretrainedConfig:
    """Configuration of a checkpoint that the engine can load: a hybrid, or a plain Llama, Mistral or Qwen2.

    Raises:
        UserError: vLLM is missing or another version, `path` is no directory, is broken or lacks a tokenizer.
    """
    line = refusal()
    if line is not None:
        raise UserError(line)
    config = open_source(path).config
    if not Path(path).is_dir():
        raise UserError(f"{path} is a file; import it first: mamba-hybrid import {path} DIR")
    if not any((Path(path) / name).is_file() for name in TOKENIZERS):
        raise UserError(f"{path} has none of {', '.join(TOKENIZERS)}; copy the model's tokenizer there")
    return config


def engine_environment() -> dict[str, str]:
    """Environment variables of vLLM with defaults for what is unset: on a CPU its cache takes a quarter of the free
    memory (1 to 16 GiB), where vLLM would take almost all. A GPU's engine does not read that."""
    import psutil  # comes with vLLM

    free = psutil.virtual_memory().available / 2**30  # what the system has cached of files is free too
    defaults = {KV_CACHE: str(int(min(max(free / 4, 1), 16))), "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    return {name: os.environ.get(name, value) for name, value in defaults.items()}
