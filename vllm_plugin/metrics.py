"""Prometheus metrics of the states, beside vLLM's own on the server's /metrics.

The engine counts in a process of its own, and vLLM's messages to the server have no place for another's counts. So
the engine writes them as Prometheus's client does with several processes, to files in memory that are read when the
server is scraped: a few hundred bytes, and no message per step.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from prometheus_client import REGISTRY
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.utils import floatToGoString

from .mirror import StepCounts

OURS, PROMETHEUS = "MAMBA_HYBRID_METRICS_DIR", "PROMETHEUS_MULTIPROC_DIR"
BUCKETS = (0, 2, 4, 8, 12, 16, 24, 32, 48, 64, float("inf"))
BYTES = "mamba_hybrid:state_bytes_per_sequence"
RUNNING = "mamba_hybrid:state_bytes_running"
REPLAYED = "mamba_hybrid:replayed_tokens"
FLUSHES = "mamba_hybrid:state_flushes"
HELP = {
    BYTES: "Bytes of state that a sequence keeps on one device, whatever its length.",
    RUNNING: "Bytes of state that the running sequences keep on one device.",
    REPLAYED: "Tokens that a sequence's decode step replays from its checkpoint, in each mixer layer.",
    FLUSHES: "Steps of sequences that wrote the state, in each mixer layer.",
}

_directory: TemporaryDirectory | None = None


def share_metrics() -> None:
    """Let this process's /metrics show what the engines that it starts will write. Where vLLM serves from several
    processes, or the user has named a directory, Prometheus's own is there already and read."""
    global _directory
    if _directory is None and not os.environ.get(PROMETHEUS):
        _directory = TemporaryDirectory(prefix="mamba_hybrid_metrics_")
        MultiProcessCollector(REGISTRY, _directory.name)
    if _directory is not None:
        os.environ[OURS] = _directory.name  # for the engine's process


def metrics_directory() -> Path | None:
    """Where an engine writes, None where no server has asked for it."""
    name = os.environ.get(PROMETHEUS) or os.environ.get(OURS)
    return Path(name) if name and Path(name).is_dir() else None


class StateMetrics:
    """One engine's metrics.

    Args:
        directory: see `metrics_directory`.
        model, engine: labels as vLLM's metrics have them.
        bytes_per_sequence: state of a sequence on one device.
        counted: whether there will be counts of steps to `add`.
    """

    def __init__(
        self, directory: Path, model: str, engine: int, bytes_per_sequence: int, *, counted: bool = True
    ) -> None:
        self.labels = {"model_name": model, "engine": str(engine)}
        self.bytes_per_sequence = bytes_per_sequence
        # names that the collector reads kind and process from; none that prometheus_client writes itself
        files = {kind: f"{kind}_{os.getpid()}-hybrid.db" for kind in ("counter", "histogram", "gauge_mostrecent")}
        self.counters, self.histograms, self.gauges = (MmapedDict(str(directory / name)) for name in files.values())
        self.buckets = [self._key(REPLAYED, f"{REPLAYED}_bucket", le=floatToGoString(le)) for le in BUCKETS]
        self.sum = self._key(REPLAYED, f"{REPLAYED}_sum")
        self.flushes = {phase: self._key(FLUSHES, f"{FLUSHES}_total", phase=phase) for phase in ("decode", "prefill")}
        self.running_key, self.running = self._key(RUNNING, RUNNING), 0
        # a key that is read is there from now on, as 0
        self.values: dict[str, float] = {}
        if counted:
            self.values |= {key: self.histograms.read_value(key)[0] for key in (*self.buckets, self.sum)}
            self.values |= {key: self.counters.read_value(key)[0] for key in self.flushes.values()}
        self.gauges.write_value(self._key(BYTES, BYTES), bytes_per_sequence, time.time())
        self.gauges.write_value(self.running_key, 0, time.time())

    def _key(self, metric: str, name: str, **labels: str) -> str:
        labels = self.labels | labels
        return mmap_key(metric, name, list(labels), list(labels.values()), HELP[metric])

    def _add(self, file: MmapedDict, key: str, amount: int) -> None:
        if amount:
            self.values[key] += amount
            file.write_value(key, self.values[key], 0)

    def add(self, counts: StepCounts) -> None:
        """Count one step of the engine."""
        for length, rows in Counter(counts.replayed).items():
            self._add(self.histograms, self.buckets[bisect_left(BUCKETS, length)], rows)
        self._add(self.histograms, self.sum, sum(counts.replayed))
        self._add(self.counters, self.flushes["decode"], counts.decode_flushes)
        self._add(self.counters, self.flushes["prefill"], counts.prefill_flushes)

    def run(self, sequences: int) -> None:
        """So many sequences run from now on."""
        if sequences != self.running:
            self.running = sequences
            self.gauges.write_value(self.running_key, sequences * self.bytes_per_sequence, time.time())
