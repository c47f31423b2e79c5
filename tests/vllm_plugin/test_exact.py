"""The plugin's tokens are those of transformers' generate, whatever the engine does with the sequences, and its metrics
those of the slots."""

from __future__ import annotations

import json
import re

import pytest

from mamba_hybrid.checkpoint import load_model

from .conftest import HERE
from .slot_counts import compare
from .tiny_hybrid import VOCAB, prompts, reference, write_hybrid, write_noisy

pytestmark = pytest.mark.slow

LENGTHS = [1, 2, 17, 64, 65, 100, 107, 114, 221, 240, 400, 600]
NEW = 64
NGRAM = {"method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 1}
TWO_PROCESSES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.fixture(scope="module")
def expected(hybrids):
    """kind -> prompts and their reference continuations, whose best two logits are never closer than fp32's noise."""
    cache = {}

    def get(kind: str, asked: list[list[int]] | None = None):
        key = kind, json.dumps(asked)
        if key not in cache:
            model = load_model(hybrids[kind])
            which = prompts(LENGTHS) if asked is None else asked
            answers = [reference(model, prompt, NEW) for prompt in which]
            assert min(gap for _, gap in answers) > 1e-3
            cache[key] = which, [tokens for tokens, _ in answers]
        return cache[key]

    return get


@pytest.fixture
def generate(hybrids, start_engine, tmp_path):
    def run(kind: str, asked: list[list[int]], environment: dict[str, str] | None = None, new: int = NEW, **llm):
        base = {
            "model": str(hybrids[kind]),
            "dtype": "float32",
            "max_model_len": 700,
            "max_num_seqs": 4,  # so that requests wait for each other
            "max_num_batched_tokens": 64,  # so that a prompt is read in pieces
            "enforce_eager": True,
            "disable_log_stats": False,
            "worker_extension_cls": "slot_watch.SlotWatch",
        }
        # the second round finds slots that the first has used
        job = {"llm": base | llm, "prompts": asked, "new": new, "rounds": 2}
        watched = tmp_path / "watched.json"
        done = start_engine(job, tmp_path, SLOT_WATCH=str(watched), **(environment or {}))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        result = json.loads((tmp_path / "result.json").read_text())
        compare(result["states"], watched)
        return result | {"log": done.stdout + done.stderr}

    return run


def speculated(result) -> None:
    counters = result["counters"]
    drafted, accepted = counters["spec_decode_num_draft_tokens"], counters["spec_decode_num_accepted_tokens"]
    assert 0 < accepted < drafted


def one_block_a_sequence(result) -> None:
    slots = result["slots"]
    assert len(slots["layers"]) == 2
    assert all(layer == slots["class"] for layer in slots["layers"].values())
    assert slots["blocks"] == [0, 0]


def test_batched_chunked_preempted(expected, generate):
    asked, answers = expected("shared")
    result = generate("shared", asked, enable_prefix_caching=False, num_gpu_blocks_override=9)
    assert result["rounds"] == [answers, answers]
    assert "A sequence keeps 0.06 MiB of state (2 mixer layers" in result["log"]
    assert result["counters"]["num_preemptions"] > 0
    one_block_a_sequence(result)
    assert [[2, 32, 32], "torch.float32"] in result["slots"]["class"]


def test_drafts_accepted_and_rejected(expected, generate, tmp_path):
    """Every accepted length occurs, with preemption; asking for prefix caching switches it off with a warning."""
    asked, answers = expected("heads")
    sequences = [p + a for p, a in zip(asked, answers, strict=True)]
    (tmp_path / "oracle.json").write_text(json.dumps({"sequences": sequences, "vocab": VOCAB}))
    result = generate(
        "heads",
        asked,
        {"ORACLE_JOB": str(tmp_path / "oracle.json")},
        speculative_config={"method": "custom_class", "model": "oracle.Oracle", "num_speculative_tokens": 4},
        num_gpu_blocks_override=6,
        enable_prefix_caching=True,
    )
    assert result["rounds"] == [answers, answers]
    speculated(result)
    assert result["counters"]["num_preemptions"] > 0
    assert "Prefix caching is switched off" in result["log"]
    one_block_a_sequence(result)


def test_ngram(expected, generate):
    asked, answers = expected("paper")
    result = generate(
        "paper",
        asked,
        speculative_config=NGRAM | {"num_speculative_tokens": 3},
    )
    assert result["rounds"] == [answers, answers]
    speculated(result)


def interpreted(environment: dict[str, str]) -> dict[str, str]:
    """For Model Runner V2 on a CPU: its Triton kernels in the interpreter."""
    return {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{HERE / 'interpreted_triton'}:{environment['PYTHONPATH']}"}


def accepted_by_protocol(draft, prompt: list[int], answer: list[int], new: int, drafts: int) -> int:
    """Drafts that are accepted when each round the draft model sees exactly the tokens that stand by then."""
    accepted, n = 0, 1  # the prompt's own step gives the first token
    while n < new:
        drafted, _ = reference(draft, prompt + answer[:n], drafts)
        right = next((i for i in range(drafts) if drafted[i] != answer[n + i]), drafts)
        accepted += right
        n += right + 1
    return accepted


def test_hybrid_draft_model(hybrids, expected, generate, environment, tmp_path):
    """A draft with mixers of its own, whose slots nothing in vLLM rolls back, on Model Runner V2: prompts are read
    as they come, the rest of the rounds are those that `Drafter` puts into graphs on a GPU."""
    asked = prompts([1, 17, 64, 65, 130], seed=5)
    asked, answers = expected("shared", asked)
    draft = write_noisy(tmp_path / "draft", hybrids["shared"], 0.03)
    result = generate(
        "shared",
        asked,
        interpreted(environment),
        new=14,
        worker_cls="round_worker.AfterADummyStep",
        max_num_batched_tokens=256,
        long_prefill_token_threshold=64,  # the last prompt ends in 2 tokens beside others' 4, whenever each came
        speculative_config={"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3},
    )
    assert result["rounds"] == [[tokens[:14] for tokens in answers]] * 2
    speculated(result)
    model = load_model(draft)
    simulated = sum(accepted_by_protocol(model, p, a, 14, 3) for p, a in zip(asked, answers, strict=True))
    assert result["counters"]["spec_decode_num_accepted_tokens"] == 2 * simulated
    assert len(result["slots"]["layers"]) == 4
    assert result["slots"]["blocks"] == [0] * 4
    # a dummy step's round is what any round is, also in time
    assert "dummy step\nread up to 5 tokens of 4 requests\nround 1: 3 drafts of 4 requests, 4 with" in result["log"]
    assert int(result["log"].rsplit(" ragged so far", 1)[0].rsplit(" ", 1)[1]) > 0


@pytest.mark.parametrize("worker", ["RoundWorker", "WithoutGraphs"])
def test_drafts_when_they_pay(hybrids, expected, generate, environment, tmp_path, worker):
    """Steps with all drafts, with half, without, and again: the draft model has seen every token in between. A guess
    right after a step without drafts is as good as others: the target as its own draft is always right."""
    asked, answers = expected("shared", prompts([3, 17, 65], seed=5))
    result = generate(
        "shared",
        asked,
        interpreted(environment),
        new=24,
        worker_cls=f"quick_choice.{worker}",
        additional_config={"mamba_hybrid": {"drafts": "when they pay"}},
        max_num_batched_tokens=256,
        speculative_config={"method": "draft_model", "model": str(hybrids["shared"]), "num_speculative_tokens": 2},
    )
    assert result["rounds"] == [[tokens[:24] for tokens in answers]] * 2
    made = "".join(re.findall(r"round[ \d]*: (\d) drafts", result["log"]))
    assert "21" in made and "10" in made and re.search("0[12]", made), made
    counters = result["counters"]
    assert 0 < counters["spec_decode_num_accepted_tokens"] == counters["spec_decode_num_draft_tokens"]


def test_prefix_caching(expected, generate):
    long = prompts([500], seed=7)[0]
    asked = [long[:n] + tail for n, tail in zip((500, 300, 256, 130), prompts([1, 30, 9, 77], seed=8), strict=True)]
    asked, answers = expected("shared", asked)
    # pieces longer than a block, and no multiple of it
    result = generate("shared", asked, enable_prefix_caching=True, max_num_batched_tokens=300)
    assert result["rounds"] == [answers, answers]
    assert result["counters"]["prefix_cache_hits"] > 0


def test_tensor_parallel(expected, generate):
    """Each of two processes has one of the two KV groups, and its channels of the convolution, in steps with drafts and
    without."""
    asked, answers = expected("shared", prompts([1, 17, 65, 130, 221], seed=9))
    speculative = NGRAM | {"num_speculative_tokens": 4}
    result = generate("shared", asked, TWO_PROCESSES, new=40, tensor_parallel_size=2, speculative_config=speculative)
    assert result["rounds"] == [[tokens[:40] for tokens in answers]] * 2
    assert result["slots"]["layers"]["model.layers.1.mixer"][0][0] == [1, 32, 32]
    speculated(result)


def test_pipeline_parallel(expected, generate):
    """Each of two processes has one attention layer and one mixer."""
    asked, answers = expected("shared", prompts([1, 17, 65, 130, 221], seed=9))
    result = generate(
        "shared", asked, TWO_PROCESSES, new=16, pipeline_parallel_size=2, worker_cls="stage_worker.StageWorker"
    )
    assert result["rounds"] == [[tokens[:16] for tokens in answers]] * 2
    assert list(result["slots"]["layers"]) == ["model.layers.1.mixer"]
    assert "A sequence keeps 0.03 MiB of state (1 mixer layers" in result["log"]


def test_prefix_caching_with_drafts(expected, generate, environment, tmp_path):
    """Model Runner V2 copies whole slots, also where a verify step has ended beyond a block's end."""
    long = prompts([300], seed=12)[0]
    asked = [long[:n] for n in (250, 124, 253)]
    asked, answers = expected("shared", asked)
    draft = write_hybrid(tmp_path / "draft", "shared", "A")
    result = generate(
        "shared",
        asked,
        interpreted(environment),
        new=9,
        enable_prefix_caching=True,
        max_num_batched_tokens=300,
        speculative_config={"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3},
    )
    assert result["rounds"] == [[tokens[:9] for tokens in answers]] * 2
    assert result["counters"]["prefix_cache_hits"] > 0
