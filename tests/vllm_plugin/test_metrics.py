"""The metrics: the rule on the host against the kernels' slots, and a server's page against its own slots."""

from __future__ import annotations

import random
import re
import socket
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mamba_hybrid_kernels import SlotLayout, SlotTensors, StepRows, replay
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from vllm_plugin.metrics import StateMetrics
from vllm_plugin.mirror import SlotMirror, StepCounts
from vllm_plugin.scheduler import rejected_drafts

from .slot_counts import compare
from .test_serve import BIN, ask
from .tiny_hybrid import prompts


@pytest.mark.parametrize("window", [0, 5, 16])
@pytest.mark.parametrize("drafts", [0, 1, 4])
def test_the_kernels_rule(window, drafts):
    """Random chunks, drafts, rejections and restarts: the mirror's checkpoints are those in the slots."""
    layout = SlotLayout(1, 1, 1, 16, 16, window, step=drafts + 1, rewind=drafts + 1 if drafts else 0)
    slots, mirror = SlotTensors.allocate(layout, 3), SlotMirror(layout)
    rng, position, prompt = random.Random(window), [0, 0, 0], [0, 0, 0]
    seen = StepCounts([])
    expected: list[int] = []
    flushes = 0
    for _ in range(300):
        names = rng.sample(range(3), rng.randint(1, 3))
        tokens, rejected, before = {}, {}, {}
        for n in names:
            if position[n] == 0 or rng.random() < 0.02:
                position[n], prompt[n] = 0, rng.randint(1, 150)
                mirror.begin(str(n), 0)
            left = prompt[n] - position[n]
            T = rng.randint(1, min(left, 64)) if left > 0 else rng.randint(1, layout.step)
            before[n] = 0 if position[n] == 0 else int(slots.position[n, 0, 0])
            tokens[str(n)] = T
            if left <= 0 and T > 1:
                rejected[str(n)] = rng.randrange(T)
            if layout.step >= T:
                expected.append(max(position[n] + T - window - before[n], 0))
        M = sum(tokens.values())
        rows = StepRows.of(names, [position[n] for n in names], list(tokens.values()))
        replay(
            slots, layout, rows, torch.randn(M, 1, 16), torch.rand(M, 1), -torch.ones(1), torch.randn(M, 1, 16),
            torch.randn(M, 1, 16), torch.ones(1),
        )  # fmt: skip
        counts = mirror.step(tokens, rejected)
        seen.replayed += counts.replayed
        seen.decode_flushes += counts.decode_flushes
        seen.prefill_flushes += counts.prefill_flushes
        for n in names:
            checkpoint = int(slots.position[n, 0, 0])
            flushes += checkpoint != before[n]
            position[n] += tokens[str(n)] - rejected.get(str(n), 0)
            assert mirror.rows[str(n)] == [position[n], checkpoint]
    assert seen.replayed == expected
    assert seen.decode_flushes + seen.prefill_flushes == flushes
    assert min(seen.decode_flushes, seen.prefill_flushes) > 0


def test_a_sequence_from_the_cache():
    """It begins at the checkpoint of the slot that was left in the block it begins from, or is not counted."""
    layout = SlotLayout(1, 1, 1, 16, 16, window=16)  # a ring of 32
    mirror = SlotMirror(layout, block_size=64)
    mirror.begin("first", 0, [7])
    mirror.step({"first": 40})  # to 24
    mirror.step({"first": 24})  # 64 - 24 > 31: to 48, in block 7
    mirror.extend("first", [8])
    mirror.step({"first": 40})  # to 88
    mirror.end("first")
    mirror.begin("second", 64, [7, 9])
    assert mirror.rows["second"] == [64, 48]
    assert mirror.step({"second": 1}) == StepCounts([1])
    for start, blocks in ((64, [8, 9]), (32, [7]), (128, [7])):
        mirror.begin("unknown", start, blocks)
        assert mirror.step({"unknown": 1}) == StepCounts([])


def test_rejected_drafts():
    drafts = {"a": [1, 2, 3], "b": [4], "c": [5, 6]}
    assert rejected_drafts(drafts, {"c": 0, "b": 1, "a": 2}, [3, 0, 2]) == {"a": 2, "c": 0}
    assert rejected_drafts(drafts, {}, []) == {}


def test_what_is_written_is_read(tmp_path):
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))

    def value(name, **labels):
        return registry.get_sample_value(f"mamba_hybrid:{name}", {"model_name": "m", "engine": "1"} | labels)

    metrics = StateMetrics(tmp_path, "m", 1, 1000)
    assert value("state_bytes_per_sequence") == 1000
    assert value("state_flushes_total", phase="decode") == value("replayed_tokens_count") == 0
    metrics.add(StepCounts([0, 3, 3, 16, 100], 2, 1))
    metrics.add(StepCounts([2], 1))
    metrics.run(4)
    metrics.run(3)
    assert value("state_bytes_running") == 3000
    assert value("state_flushes_total", phase="decode") == 3
    assert value("state_flushes_total", phase="prefill") == 1
    assert (value("replayed_tokens_count"), value("replayed_tokens_sum")) == (6, 124)
    below = [value("replayed_tokens_bucket", le=le) for le in ("0.0", "2.0", "4.0", "12.0", "16.0", "64.0", "+Inf")]
    assert below == [1, 2, 4, 4, 5, 5, 6]


def test_what_is_not_counted_is_not_there(tmp_path):
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))
    StateMetrics(tmp_path, "m", 1, 1000, counted=False).run(2)
    names = {sample.name for metric in registry.collect() for sample in metric.samples}
    assert names == {"mamba_hybrid:state_bytes_per_sequence", "mamba_hybrid:state_bytes_running"}


@pytest.mark.slow
def test_a_servers_page(hybrids, environment, tmp_path):
    """Every number on the page is that of the slots, which the worker reads before and after each step: prompts in
    pieces, drafts accepted and rejected. `test_exact.py` compares the same of engines of all kinds."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        BIN / "mamba-hybrid", "serve", hybrids["paper"], "--host", "127.0.0.1", "--port", port, "--dtype", "float32",
        "--max-model-len", 512, "--max-num-seqs", 4, "--max-num-batched-tokens", 64, "--enforce-eager",
        "--enable-chunked-prefill", "--served-model-name", "tiny", "--worker-extension-cls", "slot_watch.SlotWatch",
        "--speculative-config",
        '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}',
    ]  # fmt: skip
    watched, url = tmp_path / "watched.json", f"http://127.0.0.1:{port}"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [str(c) for c in command], env=environment | {"SLOT_WATCH": str(watched)}, stdout=log, stderr=log
        )
    try:
        for _ in range(300):
            assert process.poll() is None, (tmp_path / "log").read_text()[-4000:]
            try:
                if ask(f"{url}/health", timeout=5)[0] == 200:
                    break
            except OSError:
                time.sleep(1)

        def complete(prompt: list[int]) -> None:
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 60, "temperature": 0, "ignore_eos": True}
            assert ask(f"{url}/v1/completions", body)[0] == 200

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(complete, prompts([300, 1, 17, 100, 257, 64])))
        page = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    finally:
        process.terminate()
        process.wait(60)

    found = re.findall(r"^([\w:]+)\{([^}]*)\} (\S+)$", page, re.MULTILINE)
    samples = {
        name + "".join(re.findall(r'(?:le|phase)="([^"]*)"', labels)): float(value)
        for name, labels, value in found
        if 'engine="0"' in labels and 'model_name="tiny"' in labels
    }
    compare(samples, watched)
    log = (tmp_path / "log").read_text()
    per_sequence = samples["mamba_hybrid:state_bytes_per_sequence"]
    assert f"A sequence keeps {per_sequence / 2**20:.2f} MiB of state" in log
    accepted = samples["vllm:spec_decode_num_accepted_tokens_total"]
    assert 0 < accepted < samples["vllm:spec_decode_num_draft_tokens_total"]
