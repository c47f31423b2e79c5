"""Time decoding in vLLM at the shapes of an 8B (dummy weights): Llama, vLLM's Mamba-2 mixer, ours, with and without
speculation, one engine after another.

    python benchmarks/serving/decode.py --out decode.csv [--systems groups,groups-4,stock] [--batches 1,32,256]
                                        [--tensor-parallel-size 1,2] [--context 2048] [--seconds 2] [--memory 0.9]
                                        [--acceptance 0.75] [--settle 0] [--metrics none] [--quantization fp8] [--warm]

A system is a kind of model (llama, stock, heads, groups: see shapes.py; replay is stock with vLLM's ReplaySSM by
FlashInfer), with "-K" after it a two-layer draft model of the same kind that drafts K tokens, with "-upK" as many as
pay. A dummy model agrees with no one, so each draft is accepted with probability --acceptance by vLLM's synthetic
rejection, whatever the tokens; target and drafter compute all they would. (Adaptive verification judges drafts by the
draft model's logits, so that dummy ones cannot show what it brings.)

The rate is tokens of all sequences over a stretch of --seconds that begins when the last prompt has been read and each
sequence has got --settle tokens: "-upK" chooses meanwhile, and systems are comparable at equal --settle only, as steps
take longer the longer the contexts are. Where not all sequences fit into the memory, "running" says how many did.
--warm only starts the engines, several at once, so that what torch.compile and Triton make is on disk for the timed
start. With several tensor parallel sizes each system is started with each of them, on so many GPUs, and sums by vLLM's
own kernels and NCCL (not over NVLink multicast: no symmetric memory, no FlashInfer all-reduce or its fusion with
norms). A row is in the CSV as soon as it is there, and good rows that are there are not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from engines import environment, load, parallel, plugin, printed_rows, save
from shapes import write

KINDS = ("llama", "stock", "replay", "heads", "groups")
OURS = ("heads", "groups")
SYSTEMS = (*KINDS, "stock-4", "replay-4", "heads-4", "groups-4", "heads-8", "groups-8")
COLUMNS = (
    "system", "gpus", "batch", "running", "context", "settled", "tokens_per_second", "acceptance", "metrics", "weights",
    "status", "blocks", "gpu",
)  # fmt: skip
KEY = ("system", "gpus", "batch", "context", "settled", "acceptance", "metrics", "weights")
SETTLE = 8  # steps after the last prompt before the clock starts, at least
FULL = 40  # steps in which no sequence starts, after which the rest is taken not to fit


def arguments_of(system: str, folder: Path, args: argparse.Namespace, gpus: int = 1) -> dict:
    """vLLM's arguments for a system on so many GPUs; `args` are those of `options`."""
    from vllm_plugin.limits import CHOICE, graph_sizes

    name, _, drafts = system.partition("-")
    kind = "stock" if name == "replay" else name
    room = args.context + args.room
    engine = {
        "model": str(write(folder, kind, "target", args.tiny)), "load_format": "dummy", "skip_tokenizer_init": True,
        "max_model_len": room, "max_num_seqs": max(args.batches), "enable_prefix_caching": False,
        "max_num_batched_tokens": 256 if args.tiny else 8192, "gpu_memory_utilization": args.memory,
        "mamba_ssm_cache_dtype": "float32", "disable_log_stats": args.metrics == "none", "enforce_eager": args.tiny,
    } | parallel(gpus)  # fmt: skip
    if args.quantization:
        engine["quantization"] = args.quantization
    if args.metrics == "vllm":
        engine["scheduler_cls"] = "vllm.v1.core.sched.async_scheduler.AsyncScheduler"
    if name == "replay":
        # while vLLM tunes it, the GPU's memory does not suffice (BENCHMARKS.md)
        engine |= {"use_replayssm": True, "mamba_backend": "flashinfer", "enable_flashinfer_autotune": False}
    if drafts:
        K = int(drafts.removeprefix("up"))
        if drafts.startswith("up"):
            engine["additional_config"] = {"mamba_hybrid": CHOICE}
        draft = write(folder, kind, "draft", args.tiny)
        if kind in ("llama", "stock"):  # whole steps in CUDA graphs, as the plugin asks for ours
            engine["cudagraph_capture_sizes"] = graph_sizes(max(args.batches), K + 1, engine["max_num_batched_tokens"])
        engine["speculative_config"] = {
            "method": "draft_model", "model": str(draft), "num_speculative_tokens": K,
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_rates": [args.acceptance ** (i + 1) for i in range(K)],
        }  # fmt: skip
        if args.quantization:
            engine["speculative_config"]["quantization"] = args.quantization
    return engine


def weights(args: argparse.Namespace) -> str:
    return args.quantization or "bf16"


def acceptance(system: str, args: argparse.Namespace) -> float | str:
    return args.acceptance if "-" in system else ""


def rate(engine, batch: int, args: argparse.Namespace) -> tuple[int, float]:
    """How many of so many sequences run at once, and their tokens a second."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    rng, vocabulary = random.Random(0), 500
    sampling = SamplingParams(
        temperature=0, max_tokens=args.room - 1, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )
    names = [f"{batch}-{i}" for i in range(batch)]
    for name in names:
        prompt = [rng.randrange(3, vocabulary) for _ in range(args.context)]
        engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), sampling)
    started: set[str] = set()
    waited = 0
    while len(started) < batch and (not started or waited < FULL):
        new = {out.request_id for out in engine.step() if out.outputs[0].token_ids} - started
        waited = 0 if new else waited + 1
        started |= new

    def step() -> int:
        """Tokens of a step."""
        outs = engine.step()
        if any(out.finished for out in outs):
            raise RuntimeError(f"a sequence ended after {args.room} tokens; raise --room")
        return sum(len(out.outputs[0].token_ids) for out in outs)

    for _ in range(SETTLE):
        step()
    left = args.settle * len(started)
    while left > 0:
        left -= step()
    tokens, began = 0, time.perf_counter()
    while (took := time.perf_counter() - began) < args.seconds:
        tokens += step()
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    return len(started), tokens / took


def measure(system: str, gpus: int, batches: list[int], args: argparse.Namespace) -> None:
    """Start one engine in this process and print a JSON line for each batch."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    with tempfile.TemporaryDirectory() as folder:
        engine = LLMEngine.from_engine_args(EngineArgs(**arguments_of(system, Path(folder), args, gpus)))
        cache = engine.vllm_config.cache_config
        for batch in () if args.warm else batches:
            running, tokens = rate(engine, batch, args)
            row = {"system": system, "gpus": gpus, "batch": batch, "running": running, "context": args.context}
            row |= {"settled": args.settle, "tokens_per_second": round(tokens, 1)}
            row |= {"acceptance": acceptance(system, args), "metrics": args.metrics, "weights": weights(args)}
            row |= {"status": "ok", "blocks": cache.num_gpu_blocks, "gpu": current_platform.get_device_name()}
            print(json.dumps(row), flush=True)


def run(system: str, gpus: int, batches: list[int], known: Path, out: int = subprocess.PIPE) -> subprocess.Popen:
    """A process for a system."""
    one = f"{system} {gpus} {','.join(map(str, batches))}"
    command = [sys.executable, __file__, *sys.argv[1:], "--one", one]
    return subprocess.Popen(command, stdout=out, text=True, env=environment(known))


def options() -> argparse.ArgumentParser:
    """What the command takes; `arguments_of` reads it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="CSV to write")
    parser.add_argument("--systems", type=lambda text: text.split(","), default=list(SYSTEMS))
    parser.add_argument(
        "--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32, 64, 128, 256]
    )
    parser.add_argument(
        "--tensor-parallel-size", type=lambda text: [int(n) for n in text.split(",")], default=[1], help="1, or 1,2 ..."
    )
    parser.add_argument("--context", type=int, default=2048, help="tokens of a prompt")
    parser.add_argument("--room", type=int, default=2048, help="tokens that a sequence may get")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--settle", type=int, default=0, help="tokens of each sequence before the clock starts")
    parser.add_argument("--acceptance", type=float, default=0.75)
    parser.add_argument("--memory", type=float, default=0.9, help="share of the GPU's memory")
    parser.add_argument("--metrics", choices=("none", "vllm", "all"), default="none", help="what is counted (none)")
    parser.add_argument("--quantization", help="of target and drafter, as vLLM's, such as fp8")
    parser.add_argument("--warm", action="store_true", help="only start each engine")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, eager: a trial")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser


def main() -> int:
    parser = options()
    args = parser.parse_args()
    if args.one:
        system, gpus, batches = args.one.split()
        measure(system, int(gpus), [int(n) for n in batches.split(",")], args)
        return 0
    unknown = [s for s in args.systems if s.partition("-")[0] not in KINDS]
    if unknown:
        parser.error(f"unknown systems {unknown}; kinds are {KINDS}")
    chosen = [s for s in args.systems if "-up" in s]
    if not all(s.startswith(OURS) for s in chosen) or (chosen and args.metrics == "vllm"):
        parser.error(
            f"{', '.join(chosen)}: only {' and '.join(OURS)} draft as many as pay, and not with --metrics vllm"
        )
    with tempfile.TemporaryDirectory() as folder:
        return compare(args, plugin(Path(folder)))


def compare(args: argparse.Namespace, known: Path) -> int:
    """All systems, one after another; the exit status."""
    engines = [(system, gpus) for gpus in args.tensor_parallel_size for system in args.systems]
    if args.warm:
        # nobody reads what they print
        processes = [run(system, gpus, args.batches, known, subprocess.DEVNULL) for system, gpus in engines]
        return max(process.wait() for process in processes)
    rows = [row for row in load(args.out) if row["status"] == "ok"]

    def add(row: dict) -> None:
        rows.append(row)
        if args.out:
            save(args.out, COLUMNS, rows)

    measured = {tuple(str(row.get(key)) for key in KEY) for row in rows}
    for system, gpus in engines:
        same = (args.settle, acceptance(system, args), args.metrics, weights(args))
        asked = {n: tuple(map(str, (system, gpus, n, args.context, *same))) for n in args.batches}
        left = [n for n, key in asked.items() if key not in measured]
        if not left:
            continue
        began = time.perf_counter()
        process = run(system, gpus, left, known)
        for row in printed_rows(process):
            add(row)
        code = process.wait()
        print(f"{system} on {gpus}: exit {code} after {time.perf_counter() - began:.0f} s", flush=True)
        if code:
            add({"system": system, "gpus": gpus, "status": f"exit {code}"})
    return 0 if all(row["status"] == "ok" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
