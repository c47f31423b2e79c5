"""What a hybrid asks of the engine's configuration."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from mamba_hybrid_kernels.slot import MOST_TOKENS, SlotLayout
from vllm.distributed.utils import get_pp_indices
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from mamba_hybrid.config import ATTENTION, MIXER

from .metrics import share_metrics

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger("vllm.mamba_hybrid")

CHOICE = {"drafts": "when they pay"}
SCHEDULER = "vllm_plugin.scheduler.make_scheduler"
STATE_DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}


class Limits(VerifyAndUpdateConfig):
    """vLLM calls this where it settles the configuration, before any process is started and before it chooses the
    cache mode of recurrent layers."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what is not there, and switch prefix caching off where vLLM's does not fit.

        When it caches prefixes, vLLM copies the state between blocks. Its Model Runner V1 does so by rules for one
        state per drafted token, which a slot is not (V2 lets us copy: `snapshots.py`). A draft model's mixers work in
        blocks that the target has not come to yet. And in a model without attention layers vLLM may end a block's last
        chunk before the block's end, which makes the cached state one of an earlier position. The tokens are the same
        without the cache, so this is a warning and not an error.

        Also set here, unless the user names others: the worker that compiles our kernels before it serves, the
        scheduler that counts for the metrics, and the sizes of CUDA graphs (`graph_sizes`).

        Raises:
            ValueError: KV heads that do not divide among the devices, a pipeline stage without one of the two kinds
                of layers, stages with a draft model, a hybrid draft model on fewer devices than the target, more drafts
                than a GPU's kernel takes, a state dtype other than fp32 and bf16, or something of the plugin
                (`drafts_by_choice`) that it does not know or that others exclude.
        """
        parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
        devices, groups = parallel.tensor_parallel_size, vllm_config.model_config.hf_config.num_key_value_heads
        if groups % devices:
            raise ValueError(
                f"--tensor-parallel-size {devices} does not divide the model's {groups} key/value heads; a mixer is "
                "cut between them"
            )
        kinds, stages = vllm_config.model_config.hf_config.layer_types, parallel.pipeline_parallel_size
        for stage in range(stages):
            if lacking := set(kinds) - set(kinds[slice(*get_pp_indices(len(kinds), stage, stages))]):
                name = "mixers" if MIXER in lacking else "attention layers"
                raise ValueError(
                    f"--pipeline-parallel-size {stages} leaves stage {stage} without {name}, and vLLM 0.32 gives wrong "
                    "tokens or none then; take fewer stages, or cut them elsewhere with VLLM_PP_LAYER_PARTITION"
                )
        if cache.mamba_cache_dtype != "auto":
            raise ValueError(
                f"--mamba-cache-dtype {cache.mamba_cache_dtype} is not for mixers, whose rows have the model's dtype; "
                "the state's is --mamba-ssm-cache-dtype"
            )
        if cache.mamba_ssm_cache_dtype not in STATE_DTYPES:
            raise ValueError(
                f"--mamba-ssm-cache-dtype {cache.mamba_ssm_cache_dtype} is none of {', '.join(STATE_DTYPES)}"
            )
        obstacle, speculative = None, vllm_config.speculative_config
        drafted = speculative is not None and speculative.uses_draft_model()
        if drafted and stages > 1:
            raise ValueError(f"--pipeline-parallel-size {stages} excludes a draft model in vLLM 0.32; draft by ngram")
        if draft_with_mixers(vllm_config):
            its = speculative.draft_tensor_parallel_size
            if its != devices:  # vLLM builds its layers for the target's devices all the same
                raise ValueError(
                    f"draft_tensor_parallel_size {its} of a draft model with mixers must be --tensor-parallel-size "
                    f"{devices}; leave it out"
                )
        if current_platform.is_cuda():
            drafts = vllm_config.num_speculative_tokens
            # a step has the drafts and one token, a draft model's one more (`slot_layout`)
            most = MOST_TOKENS - (2 if draft_with_mixers(vllm_config) else 1)
            if drafts > most:
                raise ValueError(
                    f"num_speculative_tokens {drafts} in --speculative-config must be at most {most}: the mixers' "
                    f"kernels take steps of {MOST_TOKENS} tokens"
                )
            if parallel.worker_cls == "auto":
                parallel.worker_cls = "vllm_plugin.worker.HybridWorker"
        if speculative is not None and not vllm_config.use_v2_model_runner:
            obstacle = "with speculative decoding on Model Runner V1"
        elif draft_with_mixers(vllm_config):
            obstacle = "with a draft model that has mixers"
        elif ATTENTION not in vllm_config.model_config.hf_config.layer_types:
            obstacle = "without attention layers"
        if cache.enable_prefix_caching and obstacle:
            logger.warning(
                "Prefix caching is switched off: a hybrid %s cannot have it in this vLLM. "
                "--no-enable-prefix-caching says the same without this line.",
                obstacle,
            )
            cache.enable_prefix_caching = False
        if drafts_by_choice(vllm_config):
            _check_choice(vllm_config)
        if speculative is not None:
            _capture_verify_steps(vllm_config)
        # vLLM asks once more for a hybrid that drafts, in the worker, where the scheduler is the target's
        is_draft = drafted and vllm_config.model_config is speculative.draft_model_config
        counted = _has_mixers(vllm_config.model_config) and not is_draft
        if counted and vllm_config.scheduler_config.scheduler_cls is None:
            vllm_config.scheduler_config.scheduler_cls = SCHEDULER
            share_metrics()


def drafts_by_choice(vllm_config: VllmConfig) -> bool:
    """Whether `--additional-config '{"mamba_hybrid": {"drafts": "when they pay"}}'` was given.

    Raises:
        ValueError: something else is asked of the plugin.
    """
    given = vllm_config.additional_config
    ours = given.get("mamba_hybrid", {}) if isinstance(given, dict) else {}
    if ours not in ({}, CHOICE):
        raise ValueError(f"--additional-config asks {ours} of mamba_hybrid, which knows {json.dumps(CHOICE)}")
    return ours == CHOICE


def _check_choice(vllm_config: VllmConfig) -> None:
    """Raises ValueError where the number of drafts cannot change from step to step."""
    speculative, scheduler = vllm_config.speculative_config, vllm_config.scheduler_config.scheduler_cls
    if speculative is None or not speculative.uses_draft_model():
        reasons = ["needs a draft model in --speculative-config"]
    else:
        schedule = speculative.num_speculative_tokens_per_batch_size
        obstacles = {
            "needs a hybrid as the target": not _has_mixers(speculative.target_model_config),
            "needs Model Runner V2": not vllm_config.use_v2_model_runner,
            "excludes --data-parallel-size": vllm_config.parallel_config.data_parallel_size > 1,
            f"excludes --scheduler-cls {scheduler}": scheduler not in (None, SCHEDULER),
            "excludes enable_adaptive_verification": speculative.enable_adaptive_verification,
            "excludes num_speculative_tokens_per_batch_size": schedule is not None,
        }
        reasons = [reason for reason, applies in obstacles.items() if applies]
    if reasons:
        raise ValueError(f"--additional-config {json.dumps({'mamba_hybrid': CHOICE})} {', '.join(reasons)}")


def _capture_verify_steps(vllm_config: VllmConfig) -> None:
    """CUDA graphs for them, where the sizes are not the user's, nor vLLM's own for a schedule of drafts or for few
    sequences."""
    graphs, limits = vllm_config.compilation_config, vllm_config.scheduler_config
    if graphs.cudagraph_capture_sizes is not None or graphs.max_cudagraph_capture_size is not None:
        return
    if vllm_config.speculative_config.num_speculative_tokens_per_batch_size is not None:
        return
    if vllm_config.performance_mode == "interactivity":
        return
    most = 1024 if current_platform.is_cuda() and current_platform.is_device_capability_family(100) else 512
    graphs.cudagraph_capture_sizes = graph_sizes(
        limits.max_num_seqs, vllm_config.uniform_decode_query_len, limits.max_num_batched_tokens, most
    )


def graph_sizes(most_rows: int, row_tokens: int, most_tokens: int, most_sizes: int = 512) -> list[int]:
    """Tokens of the steps that are captured in CUDA graphs where sequences are verified.

    vLLM 0.32 captures steps of up to 512 tokens: 512 sequences that draft nothing, but 102 with 4 drafts. A larger step
    is launched kernel by kernel, which can take longer than its arithmetic. These are its sizes and, spaced as it
    spaces them, those of up to 512 verified sequences.

    Args:
        most_rows: sequences at once.
        row_tokens: tokens of a sequence's verify step, the drafts and one.
        most_tokens: of a step.
        most_sizes: up to which vLLM captures, 512 on most GPUs.

    Example:
        >>> graph_sizes(most_rows=3, row_tokens=5, most_tokens=8192)
        [1, 2, 3, 4, 5, 8, 10, 15, 16, 24, 30]
    """

    def spaced(most: int) -> list[int]:
        sizes = [1, 2, 4, *range(8, 256, 8), *range(256, most_sizes + 1, 16)]
        return [*(size for size in sizes if size < most), most]

    most = min(most_rows, most_sizes)
    tokens = spaced(min(2 * most_rows * row_tokens, most_sizes))
    verified = [n * row_tokens for n in spaced(min(most, most_tokens // row_tokens))]
    # spaced(most): a draft model's steps have one token of each sequence
    return sorted({size for size in (*spaced(most), *tokens, *verified) if 0 < size <= most_tokens})


def _has_mixers(model_config: ModelConfig) -> bool:
    return MIXER in (getattr(model_config.hf_config, "layer_types", None) or ())


def draft_with_mixers(vllm_config: VllmConfig) -> ModelConfig | None:
    """The engine's draft model if it has mixers."""
    speculative = vllm_config.speculative_config
    if speculative is None or not speculative.uses_draft_model():
        return None
    return speculative.draft_model_config if _has_mixers(speculative.draft_model_config) else None


def slot_layout(vllm_config: VllmConfig, model_config: ModelConfig | None = None) -> SlotLayout:
    """Slot of one sequence in one mixer layer, on one device.

    A draft model is rewound by up to K + 1 tokens and fed K + 2 at once. The target's mixers, which need one less, have
    the same then: vLLM keeps slots of one shape in one group, of several shapes in many.

    Args:
        vllm_config: the engine's.
        model_config: of another model than the engine's own, its draft model.
    """
    K = vllm_config.num_speculative_tokens
    step, rewind = (K + 1, K + 1) if K else (1, 0)
    if draft_with_mixers(vllm_config):
        step, rewind = K + 2, K + 2
    model_config = model_config or vllm_config.model_config
    config = model_config.hf_config.shard(vllm_config.parallel_config.tensor_parallel_size)
    return config.slot_layout(
        dtype=model_config.dtype,
        state_dtype=STATE_DTYPES[vllm_config.cache_config.mamba_ssm_cache_dtype],
        step=step,
        rewind=rewind,
    )
