"""The plugin on a GPU: its tokens are those of `HybridMambaForCausalLM.generate`, with CUDA graphs, whatever the engine
does with the sequences. fp32, greedy, 64 prompts of 1 to 4,000 tokens, 256 new tokens, 16 at a time."""

from __future__ import annotations

import json
import random

import pytest
import torch

from mamba_hybrid.checkpoint import load_model

from ..vllm_plugin.conftest import environment, start_engine  # noqa: F401  (fixtures)
from ..vllm_plugin.tiny_hybrid import prompts, write_hybrid, write_noisy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
PROMPTS, NEW, CONTEXT = 64, 256, 4400
NGRAM = {"method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 1}
V1, V2 = "0", "1"
WHEN_THEY_PAY = {"mamba_hybrid": {"drafts": "when they pay"}}
SEEDS = {
    "heads": 5,
    "shared": 3,
    "paper": 3,
}  # of the prompts, so that the best two tokens are further apart than noise
# what a case changes: runner, kind of mixer, drafts and where they come from, flags of vLLM
CASES = {
    "plain": (V2, "heads", None, {}),
    "eager": (V2, "shared", None, {"enforce_eager": True}),
    "paper": (V2, "paper", None, {}),
    "preempted": (V2, "heads", None, {"num_gpu_blocks_override": 150}),
    "cached": (V2, "heads", None, {"enable_prefix_caching": True}),
    "cached-ngram-4": (V2, "heads", ("ngram", 4), {"enable_prefix_caching": True}),
    "cached-ngram-8": (V2, "shared", ("ngram", 8), {"enable_prefix_caching": True}),
    "v1": (V1, "heads", None, {}),
    "ngram-4": (V2, "heads", ("ngram", 4), {}),
    "ngram-8": (V2, "shared", ("ngram", 8), {}),
    "v1-ngram-4": (V1, "shared", ("ngram", 4), {}),
    "v1-ngram-8": (V1, "heads", ("ngram", 8), {}),
    "draft-4": (V2, "heads", ("draft", 4), {}),
    "draft-8": (V2, "shared", ("draft", 8), {}),
    "draft-up-to-4": (V2, "heads", ("draft", 4), {"additional_config": WHEN_THEY_PAY}),
    "adaptive-4": (V2, "heads", ("adaptive", 4), {}),
    "adaptive-8": (V2, "shared", ("adaptive", 8), {}),
    "draft-preempted": (V2, "heads", ("draft", 4), {"num_gpu_blocks_override": 110}),
}


def asked(kind: str) -> list[list[int]]:
    """Prompts of all lengths; some repeat themselves, so that ngrams are found, some share a beginning."""
    rng = random.Random(0)
    lengths = [1, 2, 4000] + [int(4000 ** rng.random()) for _ in range(PROMPTS - 3)]
    result = prompts(lengths, seed=SEEDS[kind])
    for i in range(8, PROMPTS, 8):
        n = len(result[i])
        result[i] = (result[i][: max(n // 3, 1)] * 4)[:n]
        result[i - 1][: n // 2] = result[i][: n // 2]
    return result


@pytest.fixture(scope="module")
def hybrids(tmp_path_factory):
    base = tmp_path_factory.mktemp("hybrids")
    made = {}

    def get(kind: str):
        if kind not in made:
            made[kind] = write_hybrid(base / kind, kind, max_position_embeddings=8192)
        return made[kind]

    return get


@pytest.fixture(scope="module")
def expected(hybrids):
    """Prompts, their continuations by transformers on the GPU, and the smallest gap between the best two logits."""
    made = {}

    def get(kind: str):
        if kind not in made:
            model = load_model(hybrids(kind)).cuda()
            which, answers, gaps = asked(kind), {}, []
            order = sorted(range(PROMPTS), key=lambda i: len(which[i]))
            for at in range(0, PROMPTS, 4):
                batch = order[at : at + 4]
                longest = len(which[batch[-1]])
                ids = torch.tensor([[0] * (longest - len(which[i])) + which[i] for i in batch], device="cuda")
                mask = torch.tensor([[0] * (longest - len(which[i])) + [1] * len(which[i]) for i in batch]).cuda()
                out = model.generate(
                    ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
                    eos_token_id=None, output_logits=True, return_dict_in_generate=True,
                )  # fmt: skip
                best = torch.stack(out.logits, 1).topk(2, -1).values
                gaps.append((best[..., 0] - best[..., 1]).min().item())
                answers |= dict(zip(batch, out.sequences[:, longest:].tolist(), strict=True))
            assert min(gaps) > 1e-4
            made[kind] = which, [answers[i] for i in range(PROMPTS)], min(gaps)
            del model, out
            torch.cuda.empty_cache()
        return made[kind]

    return get


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_generate(case, hybrids, expected, start_engine, tmp_path):  # noqa: F811
    runner, kind, drafts, flags = CASES[case]
    which, answers, gap = expected(kind)
    llm = {
        "model": str(hybrids(kind)), "dtype": "float32", "max_model_len": CONTEXT, "max_num_seqs": 16,
        "max_num_batched_tokens": 512, "disable_log_stats": False, "gpu_memory_utilization": 0.05,
        "enable_prefix_caching": False, "num_gpu_blocks_override": 4000,
    }  # fmt: skip
    if drafts is not None:
        method, number = drafts
        speculative = NGRAM | {"num_speculative_tokens": number}
        if method != "ngram":
            draft = write_noisy(tmp_path / "draft", hybrids(kind), 0.03)
            speculative = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": number}
            speculative["enable_adaptive_verification"] = method == "adaptive"
        llm["speculative_config"] = speculative
    # the second round finds slots that the first has used
    job = {"llm": llm | flags, "prompts": which, "new": NEW, "rounds": 2}
    # vLLM's Triton attention rounds fp32 to tf32 unless Triton is told otherwise
    switches = {"TRITON_F32_DEFAULT": "ieee", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    done = start_engine(job, tmp_path, VLLM_USE_V2_MODEL_RUNNER=runner, **switches)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    if case.startswith(("draft", "adaptive")):
        assert "Capturing draft rounds" in done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    for tokens in result["rounds"]:
        wrong = [i for i in range(PROMPTS) if tokens[i] != answers[i]]
        first = [next(n for n in range(NEW) if tokens[i][n] != answers[i][n]) for i in wrong]
        assert not wrong, f"{len(wrong)} of {PROMPTS} differ: {list(zip(wrong, first, strict=True))}; least gap {gap}"
    counters = result["counters"]
    if drafts is not None:
        accepted, drafted = (counters[f"spec_decode_num_{name}_tokens"] for name in ("accepted", "draft"))
        assert 0 < accepted < drafted
    if "up-to" in case:
        # sequences in steps with drafts, of which each got one token and more
        rows = counters["spec_decode_num_drafts"]
        assert drafted < drafts[1] * rows
        assert counters["generation_tokens"] > 2 * PROMPTS + rows + accepted  # the first come with the prompts
    if "preempted" in case:
        assert counters["num_preemptions"] > 0
    if "cached" in case:
        assert counters["prefix_cache_hits"] > 0
    print(f"{case}: {PROMPTS} of {PROMPTS}, least gap {gap:.1e}, counters {counters}")
