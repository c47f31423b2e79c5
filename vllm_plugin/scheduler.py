"""vLLM's scheduler, which also counts what its steps do to the states and, where asked to, chooses how much to draft.

The scheduler is the one place where a step's rows and what was accepted of them are known on the host, in the order in
which the device runs them, with asynchronous scheduling too.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import MambaSpec

from .draft_choice import DraftChoice
from .limits import drafts_by_choice, slot_layout
from .memory import memory_line, state_bytes
from .metrics import StateMetrics, metrics_directory
from .mirror import SlotMirror

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput

logger = init_logger("vllm.mamba_hybrid")
Begun = list[tuple[str, int, tuple[int, ...]]]  # sequence, position and blocks where it starts


def make_scheduler(vllm_config: VllmConfig, **kwargs: Any) -> Scheduler:
    """The scheduler that vLLM would take, with our counts. vLLM calls this as `--scheduler-cls`.

    Args:
        vllm_config: the engine's.
        kwargs: see vLLM's scheduler.
    """
    kind = CountingAsyncScheduler if vllm_config.scheduler_config.async_scheduling else CountingScheduler
    return kind(vllm_config=vllm_config, **kwargs)


def rejected_drafts(drafts: dict[str, list[int]], index: dict[str, int], sampled: list[int]) -> dict[str, int]:
    """How many drafts a step took back.

    Args:
        drafts: sequence -> its drafts in the step.
        index: sequence -> its row.
        sampled: of each row how many tokens it got: the accepted drafts and one more. Empty where none did.

    Returns:
        Sequence -> rejected drafts, for those that got tokens.
    """
    got = ((name, len(tokens), sampled[index[name]] if sampled else 0) for name, tokens in drafts.items())
    return {name: drafted + 1 - tokens for name, drafted, tokens in got if tokens}


class CountingScheduler(Scheduler):
    """Of synchronous scheduling."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        logger.info(memory_line(self.vllm_config, self.kv_cache_config))
        self.choice: DraftChoice | None = None
        if drafts_by_choice(self.vllm_config):
            self.choice = DraftChoice(self.num_spec_tokens)
            self.dynamic_sd_lookup = self.choice  # type: ignore[assignment]
        self.state_metrics: StateMetrics | None = None
        directory, config = metrics_directory(), self.vllm_config
        if not self.log_stats or directory is None:
            return
        # the model's own mixers all stand at the same checkpoint, so one group tells of all
        self.mixer_group, spec = next(
            (i, group.kv_cache_spec)
            for i, group in enumerate(self.kv_cache_config.kv_cache_groups)
            if isinstance(group.kv_cache_spec, MambaSpec)
            and not all(name.startswith("draft_model") for name in group.layer_names)
        )
        speculative = config.speculative_config
        # with adaptive verification only the device knows how long its steps are
        self.exact = speculative is None or not speculative.enable_adaptive_verification
        # a state that a connector brings along is one that no step here has made
        cached = config.cache_config.enable_prefix_caching and self.connector is None
        self.uncounted: list[tuple[SchedulerOutput, Begun, dict[str, int], list[int]]] = []
        self.begun: dict[int, Begun] = {}  # of the steps that the device has
        self.mirror = SlotMirror(slot_layout(config), spec.block_size if cached else None)
        self.state_metrics = StateMetrics(
            directory,
            config.model_config.served_model_name,
            config.parallel_config.data_parallel_index,
            state_bytes(self.kv_cache_config),
            counted=self.exact,
        )

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """As vLLM's. A worker in this process lengthens the lists of blocks that it is handed, so they are read now."""
        began = time.perf_counter()
        scheduled = super().schedule(throttle_prefills)
        if self.state_metrics is not None and self.exact:
            self.begun[id(scheduled)] = self._begun(scheduled)
        if self.choice is not None:
            self.choice.begin(scheduled, began)
        return scheduled

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """As vLLM's. The device may be waiting, so that the step is only laid aside to be counted."""
        # now, because vLLM cuts what is behind a stop
        sampled = list(map(len, model_runner_output.sampled_token_ids))
        if self.choice is not None:
            self.choice.end(scheduler_output, sum(sampled), time.perf_counter())
        if self.state_metrics is None:
            return super().update_from_output(scheduler_output, model_runner_output)
        if self.exact:
            begun = self.begun.pop(id(scheduler_output))
            self.uncounted.append((scheduler_output, begun, model_runner_output.req_id_to_index, sampled))
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self.state_metrics.run(len(self.running))
        if not self.running:
            self._count()
        return outputs

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        """As vLLM's, which asks for it when the device has just been given its next step: the time to count."""
        if self.state_metrics is not None:
            self._count()
        return super().get_grammar_bitmask(scheduler_output)

    def _count(self) -> None:
        assert self.state_metrics is not None
        for scheduled, begun, index, sampled in self.uncounted:
            self._follow(scheduled, begun)
            rejected = rejected_drafts(scheduled.scheduled_spec_decode_tokens, index, sampled)
            self.state_metrics.add(self.mirror.step(scheduled.num_scheduled_tokens, rejected))
        self.uncounted.clear()

    def _begun(self, scheduled: SchedulerOutput) -> Begun:
        """Sequences that start in a step, or start again."""
        group, cached = self.mixer_group, scheduled.scheduled_cached_reqs
        begun = [(r.req_id, r.num_computed_tokens, tuple(r.block_ids[group])) for r in scheduled.scheduled_new_reqs]
        if cached.resumed_req_ids:
            for name, start, blocks in zip(
                cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True
            ):
                if name in cached.resumed_req_ids:
                    begun.append((name, start, tuple(blocks[group]) if blocks else ()))
        return begun

    def _follow(self, scheduled: SchedulerOutput, begun: Begun) -> None:
        """Sequences that came and went, and their blocks, as the workers are told of them."""
        mirror, cached = self.mirror, scheduled.scheduled_cached_reqs
        for name in scheduled.finished_req_ids:
            mirror.end(name)
        for name, start, blocks in begun:
            mirror.begin(name, start, blocks)
        if not mirror.block_size:
            return
        for name, more in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if more and name not in cached.resumed_req_ids:
                mirror.extend(name, more[self.mixer_group])


class CountingAsyncScheduler(CountingScheduler, AsyncScheduler):
    """Of asynchronous scheduling."""
