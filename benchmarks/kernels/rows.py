"""A row of the verify benchmark's results: one contender in one case."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class StepRow:
    """One contender in one case, without figures unless its status is "ok".

    Args:
        batch, tokens: the case.
        contender: the system.
        how: launch or algorithm.
        status: ok, wrong, error or not installed.
        microseconds, half_iqr: median of the replays and half the distance between their quartiles.
        bytes: that the step has to move.
        percent_of_copy: of the measured copy bandwidth.
        to_flashinfer, to_vllm_plain, to_vllm_plain_default, to_vllm_speculative: how many times as fast as FlashInfer's
            best algorithm, vLLM's one-token update at its best and at its default configuration, vLLM's speculative
            update; of the same case.
        flush_share: of the rows, drawn as the system's own rule has it; empty where the rows have no say.
        sets: disjoint sets of slots in a graph.
        problem: what went wrong.
        gpu, copy_bandwidth: the machine, and its bytes per second, read plus written.
    """

    batch: int
    tokens: int
    contender: str
    how: str
    status: str = "ok"
    microseconds: float | None = None
    half_iqr: float | None = None
    bytes: float | None = None
    percent_of_copy: float | None = None
    to_flashinfer: float | None = None
    to_vllm_plain: float | None = None
    to_vllm_plain_default: float | None = None
    to_vllm_speculative: float | None = None
    flush_share: float | None = None
    sets: int | None = None
    problem: str = ""
    gpu: str = ""
    copy_bandwidth: float | None = None
