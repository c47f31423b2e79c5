"""A step finds the smallest captured graph of its length, whatever other lengths are captured."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_plugin.draft_choice import choices
from vllm_plugin.limits import graph_sizes

DRAFTS = 4
LENGTHS = [n + 1 for n in choices(DRAFTS)]


def manager(seqs: int, mode: str = "FULL_AND_PIECEWISE", sizes: list[int] | None = None, schedule=None):
    """vLLM's manager of a target's graphs, as it is before the capture."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    sizes = sizes or graph_sizes(seqs, DRAFTS + 1, 8192)
    made = object.__new__(CudaGraphManager)
    made.__dict__ |= {
        "compilation_config": SimpleNamespace(
            cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=max(sizes)
        ),
        "vllm_config": SimpleNamespace(
            num_speculative_tokens=DRAFTS,
            speculative_config=SimpleNamespace(
                uses_dynamic_speculative_decoding=lambda: schedule is not None,
                num_speculative_tokens_per_batch_size=schedule,
            ),
            cache_config=SimpleNamespace(use_kda_recoverssm=False),
        ),
        "max_num_reqs": seqs, "decode_query_len": DRAFTS + 1, "cudagraph_mode": CUDAGraphMode[mode],
        "lora_capture_cases": [0], "_lora_dispatch_map": {}, "_max_lora_case": 0, "varlen_decode": False,
        "ubatch_runner": None, "_candidates": {}, "_capture_descs": {}, "_graphs_captured": True,
    }  # fmt: skip
    made._init_candidates()
    return made


@pytest.mark.parametrize(
    ("seqs", "given"),
    [
        (1, {}),
        (3, {}),
        (40, {}),
        (256, {}),
        (16, {"sizes": [5, 10, 20, 40, 80]}),
        (60, {"sizes": [1, 2, 4, 8, 60, 120, 150, 180, 300], "schedule": [(1, 30, 4), (31, 50, 2), (51, 60, 0)]}),
    ],
)
def test_each_length_has_its_graphs(seqs, given):
    from vllm.config.compilation import CUDAGraphMode

    from vllm_plugin.verify_graphs import capture_lengths

    graphs = manager(seqs, **given)
    mixed = graphs._capture_descs[CUDAGraphMode.PIECEWISE]
    capture_lengths(graphs, LENGTHS)
    captured = graphs._capture_descs[CUDAGraphMode.FULL]
    assert len(captured) == len(set(captured)) <= len(LENGTHS) * len(mixed)
    assert captured == sorted(captured, key=lambda desc: -desc.num_tokens)
    assert graphs._capture_descs[CUDAGraphMode.PIECEWISE] == mixed
    for T in LENGTHS:
        for R in range(1, seqs + 1):
            found = graphs.dispatch(R, R * T, T, 0)
            assert found.cg_mode == CUDAGraphMode.FULL and found in captured
            fitting = [d for d in captured if d.uniform_token_count == T and d.num_reqs >= R]
            assert found == min(fitting, key=lambda d: d.num_tokens)
    if seqs > 1:  # steps that read prompts go layer by layer as before
        assert graphs.dispatch(2, 9, None, 0).cg_mode == CUDAGraphMode.PIECEWISE


@pytest.mark.parametrize("mode", ["NONE", "PIECEWISE", "FULL"])
def test_left_alone(mode):
    from vllm_plugin.verify_graphs import capture_lengths

    graphs, untouched = manager(40, mode), manager(40, mode)
    capture_lengths(graphs, LENGTHS)
    assert graphs._capture_descs == untouched._capture_descs
    assert graphs._candidates == untouched._candidates
