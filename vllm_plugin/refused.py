"""What stands in for hybrids in a vLLM that the plugin is not made for."""

from __future__ import annotations

import logging
from typing import Any, NoReturn

from transformers import AutoConfig

from mamba_hybrid.config import HybridMambaConfig


def refuse(line: str) -> None:
    """Log `line`, and raise it when this process reads a hybrid's configuration.

    Not raised here: that would keep the engine from starting with models that are none of ours.
    """

    class RefusedConfig(HybridMambaConfig):
        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> NoReturn:
            raise RuntimeError(line)

    AutoConfig.register(HybridMambaConfig.model_type, RefusedConfig, exist_ok=True)
    logging.getLogger("vllm").error("%s", line)
