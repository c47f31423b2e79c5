"""The counts under asynchronous scheduling, where the next step is scheduled before the last one's drafts are judged.
vLLM has no asynchronous scheduling on a CPU, so that here its scheduler runs without a worker."""

from __future__ import annotations

import random
from collections import deque

import pytest
import torch
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
from vllm import EngineArgs, SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

import vllm_plugin
from vllm_plugin.limits import slot_layout
from vllm_plugin.metrics import PROMETHEUS
from vllm_plugin.scheduler import CountingAsyncScheduler, make_scheduler, state_bytes

from .tiny_hybrid import VOCAB, prompts


class Device:
    """Runs steps as a worker does: a row begins where the device itself knows that the accepted tokens end."""

    def __init__(self, layout, seed: int) -> None:
        self.layout, self.random = layout, random.Random(seed)
        self.at: dict[str, int] = {}
        self.checkpoint: dict[str, int] = {}
        self.length: dict[str, int] = {}  # tokens that the sequence has
        self.replayed: list[int] = []
        self.flushes = self.rejected = 0

    def run(self, scheduled: SchedulerOutput) -> ModelRunnerOutput:
        cached, layout = scheduled.scheduled_cached_reqs, self.layout
        for new in scheduled.scheduled_new_reqs:
            self.at[new.req_id], self.checkpoint[new.req_id] = new.num_computed_tokens, 0
            self.length[new.req_id] = new.prompt_len
        for name, start in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            if name in cached.resumed_req_ids:
                self.at[name], self.checkpoint[name] = start, 0
        names, sampled = list(scheduled.num_scheduled_tokens), []
        for name, T in scheduled.num_scheduled_tokens.items():
            end, c = self.at[name] + T, self.checkpoint[name]
            if layout.step >= T:
                self.replayed.append(max(end - layout.window - c, 0))
            if end + layout.step - c > layout.ring:
                self.flushes += 1
                self.checkpoint[name] = end - layout.rewind - layout.window
            drafts = len(scheduled.scheduled_spec_decode_tokens.get(name, ()))
            accepted = self.random.randint(0, drafts)
            self.rejected += drafts - accepted
            whole = end - drafts >= self.length[name]
            sampled.append([self.random.randrange(6, VOCAB) for _ in range(accepted + 1)] if whole else [])
            self.at[name] = end - drafts + accepted
            self.length[name] += len(sampled[-1])
        return ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, sampled)


@pytest.mark.parametrize("drafts", [0, 3])
def test_counts_one_step_behind(drafts, hybrids, tmp_path, monkeypatch):
    monkeypatch.setenv(PROMETHEUS, str(tmp_path))  # where an engine of several servers writes
    vllm_plugin.register()
    speculative = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 2}
    config = EngineArgs(
        model=str(hybrids["shared"]), dtype="float32", max_model_len=512, max_num_seqs=4, max_num_batched_tokens=64,
        enable_prefix_caching=False, speculative_config=speculative if drafts else None,
    ).create_engine_config()  # fmt: skip
    assert config.scheduler_config.get_scheduler_cls() is make_scheduler
    config.scheduler_config.async_scheduling = True
    config.cache_config.num_gpu_blocks = 9
    layout, block = slot_layout(config), config.cache_config.block_size
    fields = layout.fields().values()
    mixers = MambaSpec(
        block_size=512, shapes=tuple(f[0] for f in fields), dtypes=tuple(f[1] for f in fields), mamba_type="mamba2"
    )
    attention = FullAttentionSpec(block_size=block, num_kv_heads=2, head_size=32, dtype=torch.float32)
    groups = [KVCacheGroupSpec(["a", "b"], attention), KVCacheGroupSpec(["c", "d"], mixers)]
    kv_cache_config = KVCacheConfig(num_blocks=9, kv_cache_tensors=[], kv_cache_groups=groups)
    scheduler = make_scheduler(
        vllm_config=config, kv_cache_config=kv_cache_config, block_size=512, hash_block_size=block, log_stats=True,
        structured_output_manager=StructuredOutputManager(config),
    )  # fmt: skip
    assert isinstance(scheduler, CountingAsyncScheduler)
    assert state_bytes(kv_cache_config) == 2 * layout.bytes()

    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))

    def value(name: str, **labels: str) -> float:
        label = {"model_name": config.model_config.served_model_name, "engine": "0"}
        return registry.get_sample_value(f"mamba_hybrid:{name}", label | labels)

    device, queue, preempted, most = Device(layout, drafts), deque(), 0, 0.0
    for i, prompt in enumerate(prompts([1, 2, 17, 100, 300, 250, 64, 128, 200])):
        sampling = SamplingParams(max_tokens=100, ignore_eos=True)
        scheduler.add_request(Request(str(i), prompt, sampling, None))
    steps = 0
    while scheduler.has_requests() or queue:
        if scheduler.has_requests():
            queue.append(scheduler.schedule())
            if queue[-1].total_num_scheduled_tokens:  # as the engine asks
                scheduler.get_grammar_bitmask(queue[-1])
            preempted += len(queue[-1].preempted_req_ids or ())
        if len(queue) == 2 or not scheduler.has_requests():
            scheduled = queue.popleft()
            scheduler.update_from_output(scheduled, device.run(scheduled))
            most = max(most, value("state_bytes_running"))
        steps += 1
        if steps == 40:
            scheduler.finish_requests("0", RequestStatus.FINISHED_ABORTED)
    assert preempted > 0
    assert (device.rejected > 0) is bool(drafts)
    assert value("replayed_tokens_count") == len(device.replayed) > 300
    assert value("replayed_tokens_sum") == sum(device.replayed)
    flushed = value("state_flushes_total", phase="decode") + value("state_flushes_total", phase="prefill")
    assert flushed == device.flushes > 50
    assert value("state_bytes_per_sequence") == 2 * layout.bytes()
    assert 2 * 2 * layout.bytes() < most <= 4 * 2 * layout.bytes()
    assert value("state_bytes_running") == 0
