"""Time of a GPU operation: CUDA graphs over data that L2 does not hold, median of replays."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

REPLAYS = 30  # of each contender, unless they take too long
LEAST = 7  # replays, however long they take
WARMING = 3  # rounds before the ones that count


class Captured:
    """A CUDA graph of several calls, replayed and timed.

    Args:
        calls: the operations, each on data of its own so that none finds what the one before it left in L2.
        reset: called before each replay, outside the timed region.
    """

    def __init__(self, calls: list[Callable[[], object]], reset: Callable[[], object] | None = None) -> None:
        self.count, self.reset = len(calls), reset
        self.calls = calls  # a graph does not keep alive what it reads
        calls[0]()  # compile
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls[:2]:
                call()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for call in calls:
                call()
        self.run: Callable[[], object] = self.graph.replay

    def once(self) -> float:
        """Microseconds per call of one replay."""
        if self.reset:
            self.reset()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e3 / self.count


class Launched(Captured):
    """One call launched from Python as a user does, for operations much longer than their launches."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.count, self.reset, self.run = 1, None, call
        call()  # compile
        torch.cuda.synchronize()


def rounds(contenders: dict[str, Captured], replays: int, seconds: float | None) -> dict[str, list[float]]:
    """Name -> microseconds of each replay, contenders taking turns; stops at `seconds`, with LEAST replays at least."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    began = time.perf_counter()
    for i in range(replays + WARMING):
        if seconds is not None and i >= LEAST + WARMING and time.perf_counter() - began > seconds:
            break
        for name, captured in contenders.items():
            took = captured.once()
            if i >= WARMING:
                times[name].append(took)
    return times


def median(
    contenders: dict[str, Captured], replays: int = REPLAYS, seconds: float | None = None
) -> dict[str, tuple[float, float]]:
    """Name -> (median microseconds, half the distance between the quartiles), contenders taking turns.

    Args:
        contenders: what to time.
        replays: of each, at most.
        seconds: no new round after so many, once each was replayed LEAST times; None for no limit.
    """
    result = {}
    for name, values in rounds(contenders, replays, seconds).items():
        low, middle, high = statistics.quantiles(values, n=4)
        result[name] = (middle, (high - low) / 2)
    return result


def copy_bandwidth(gib: int = 4) -> float:
    """Bytes per second, read plus written, of a large copy on the device."""
    source = torch.empty(gib << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    micros = median({"copy": Captured([lambda: target.copy_(source)])}, 10)["copy"][0]
    return 2 * source.numel() / micros * 1e6
