"""CUDA graphs of the target where its steps verify now more drafts, now fewer."""

from __future__ import annotations

from vllm.config import CompilationConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager


def numbers_of_sequences(config: CompilationConfig, most: int) -> list[int]:
    """For how many sequences steps are captured: vLLM's sizes, as far as there can be so many, and the most."""
    sizes = {n for n in config.cudagraph_capture_sizes or () if n < most} | {most}
    return sorted(n for n in sizes if n <= (config.max_cudagraph_capture_size or 0))


def graph(R: int, T: int, loras: int = 0) -> BatchExecutionDescriptor:
    """Names a graph of R sequences of T tokens."""
    return BatchExecutionDescriptor(
        cg_mode=CUDAGraphMode.FULL, num_tokens=R * T, num_reqs=R, uniform_token_count=T, num_active_loras=loras
    )


def capture_lengths(manager: CudaGraphManager, lengths: list[int]) -> None:
    """Let it capture steps of each length, for as many sequences as there are sizes, and find them.

    vLLM 0.32 rounds each of its sizes up to a multiple of each length, which makes more graphs than are of use, and
    looks for a graph among the smallest that hold a step's tokens, which most often are of one length: a step of
    another length that a larger graph would hold is then launched layer by layer.

    Args:
        manager: of the target, which has captured nothing yet. Left alone where it captures no decode steps by
            themselves, or steps of mixed lengths.
        lengths: tokens of each sequence in a step, the drafts and one.
    """
    full, config = CUDAGraphMode.FULL, manager.compilation_config
    found = manager._capture_descs.get(full, [])
    if not found or any(desc.uniform_token_count is None for desc in found):
        return
    descs = sorted(
        (
            graph(R, T, loras)
            for loras in manager.lora_capture_cases
            for T in lengths
            for R in numbers_of_sequences(config, manager.max_num_reqs)
            if config.max_cudagraph_capture_size >= R * T
        ),
        key=lambda desc: desc.num_tokens,
    )
    manager._capture_descs[full] = descs[::-1]
    for (tokens, loras), candidates in manager._candidates.items():
        smallest: dict[int | None, BatchExecutionDescriptor] = {}
        for desc in descs:
            if desc.num_tokens >= tokens and desc.num_active_loras == loras:
                smallest.setdefault(desc.uniform_token_count, desc)
        candidates[:] = [*smallest.values(), *(desc for desc in candidates if desc.cg_mode != full)]
