"""What prefix caching saves in conversations: hit rate and time to the first token, with and without it.

    python benchmarks/serving/turns.py [--systems groups,groups-4] [--conversations 16] [--turns 6] [--question 256]
                                       [--answer 128] [--out turns.csv]

Systems as in decode.py, with dummy weights at the shapes of an 8B. Each conversation asks again and again: a turn's
prompt is all that was said before and a new question of random tokens. All conversations ask at once, and the next turn
begins when each has its answer, so a first token waits for the prompts of the others too. A draft model that has mixers
switches prefix caching off, so the drafter of a system "-K" is a Llama here.
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
from collections.abc import Sequence
from pathlib import Path

from decode import arguments_of, options
from engines import environment, plugin, printed_rows, save
from shapes import write

COLUMNS = ("system", "caching", "turn", "prompt_tokens", "ttft_ms_mean", "ttft_ms_p90", "hit_rate", "gpu")


def measure(system: str, caching: bool, args: argparse.Namespace) -> None:
    """One engine; prints a JSON line for each turn."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import EngineArgs, SamplingParams, TokensPrompt
    from vllm.platforms import current_platform
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.llm_engine import LLMEngine

    rng = random.Random(0)
    sampling = SamplingParams(
        temperature=0, max_tokens=args.answer, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )
    with tempfile.TemporaryDirectory() as folder:
        given = arguments_of(system, Path(folder), args) | {"enable_prefix_caching": caching}
        if "speculative_config" in given:
            given["speculative_config"]["model"] = str(write(Path(folder), "llama", "draft", args.tiny))
        engine = LLMEngine.from_engine_args(EngineArgs(**given))

        def said(name: str) -> int:
            return next(m.value for m in engine.get_metrics() if m.name == f"vllm:prefix_cache_{name}")

        histories: list[list[int]] = [[] for _ in range(args.conversations)]
        for turn in range(-1, args.turns):  # the first one warms up and is forgotten
            before = said("hits"), said("queries")
            began, first = {}, {}
            for i, history in enumerate(histories):
                history += [rng.randrange(3, 500) for _ in range(args.question)]
                began[f"{turn}-{i}"] = time.perf_counter()
                engine.add_request(f"{turn}-{i}", TokensPrompt(prompt_token_ids=list(history)), sampling)
            asked = len(histories[0])
            while engine.has_unfinished_requests():
                for out in engine.step():
                    new = out.outputs[0].token_ids
                    if new and out.request_id not in first:
                        first[out.request_id] = time.perf_counter() - began[out.request_id]
                    histories[int(out.request_id.rsplit("-", 1)[1])] += new
            if turn < 0:
                histories = [[] for _ in histories]
                continue
            waits = sorted(first.values())
            hits, queries = said("hits") - before[0], said("queries") - before[1]
            row = {"system": system, "caching": caching, "turn": turn + 1, "prompt_tokens": asked}
            row["ttft_ms_mean"] = round(1e3 * sum(waits) / len(waits), 1)
            row["ttft_ms_p90"] = round(1e3 * waits[int(0.9 * (len(waits) - 1))], 1)
            row["hit_rate"] = round(hits / queries, 3) if queries else 0.0
            print(json.dumps(row | {"gpu": current_platform.get_device_name()}), flush=True)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's arguments, and decode.py's for its engines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", type=lambda text: text.split(","), default=["groups", "groups-4"])
    parser.add_argument("--conversations", type=int, default=16)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--question", type=int, default=256, help="new tokens of a turn's prompt")
    parser.add_argument("--answer", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--memory", type=float, default=0.9, help="share of the GPU's memory")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, eager: a trial")
    parser.add_argument("--out", type=Path, help="CSV to write")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = argparse.Namespace(**vars(options().parse_args([])) | vars(parser.parse_args(argv)))
    args.batches, args.metrics = [args.conversations], "all"
    args.context, args.room = args.turns * (args.question + args.answer), args.question + args.answer
    return args


def main() -> int:
    args = arguments()
    if args.one:
        system, caching = args.one.split()
        measure(system, caching == "on", args)
        return 0
    rows: list[dict] = []
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        known = plugin(Path(folder))
        for one in [f"{system} {caching}" for system in args.systems for caching in ("off", "on")]:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", one]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(known))
            rows += list(printed_rows(process))
            failed |= process.wait() != 0
    if args.out:
        save(args.out, COLUMNS, rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
