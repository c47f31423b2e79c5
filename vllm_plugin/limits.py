"""What a hybrid asks of the engine's configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from mamba_hybrid_kernels import SlotLayout
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from mamba_hybrid.config import ATTENTION

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.mamba_hybrid")

STATE_DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}


class Limits(VerifyAndUpdateConfig):
    """vLLM calls this where it settles the configuration, before any process is started and before it chooses the
    cache mode of recurrent layers."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what is not there, and switch prefix caching off where vLLM's does not fit.

        When it caches prefixes, vLLM copies the state between blocks: with speculation by rules for one state per
        drafted token, which a slot is not; and in a model without attention layers it may end a block's last chunk
        before the block's end, which makes the cached state one of an earlier position. The tokens are the same
        without the cache, so this is a warning and not an error.

        Raises:
            ValueError: more than one device, or a state dtype other than fp32 and bf16.
        """
        parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
        for flag, size in (
            ("--tensor-parallel-size", parallel.tensor_parallel_size),
            ("--pipeline-parallel-size", parallel.pipeline_parallel_size),
        ):
            if size != 1:
                raise ValueError(f"{flag} {size}: a hybrid is served by one device per replica; use {flag} 1")
        if cache.mamba_ssm_cache_dtype not in STATE_DTYPES:
            raise ValueError(
                f"--mamba-ssm-cache-dtype {cache.mamba_ssm_cache_dtype} is none of {', '.join(STATE_DTYPES)}"
            )
        obstacle = None
        if vllm_config.speculative_config is not None:
            obstacle = "with speculative decoding"
        elif ATTENTION not in vllm_config.model_config.hf_config.layer_types:
            obstacle = "without attention layers"
        if cache.enable_prefix_caching and obstacle:
            logger.warning(
                "Prefix caching is switched off: a hybrid %s cannot have it in this vLLM. "
                "--no-enable-prefix-caching says the same without this line.",
                obstacle,
            )
            cache.enable_prefix_caching = False


def slot_layout(vllm_config: VllmConfig, *, draft: bool = False) -> SlotLayout:
    """Slot of one sequence in one mixer layer.

    Args:
        vllm_config: the engine's.
        draft: of a draft model, which vLLM rewinds by up to K + 1 tokens and feeds K + 2 at once.
    """
    K = vllm_config.num_speculative_tokens
    step, rewind = (K + 2, K + 2) if draft else (K + 1, K + 1 if K else 0)
    return vllm_config.model_config.hf_config.slot_layout(
        dtype=vllm_config.model_config.dtype,
        state_dtype=STATE_DTYPES[vllm_config.cache_config.mamba_ssm_cache_dtype],
        step=step,
        rewind=rewind,
    )
