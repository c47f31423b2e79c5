"""Random arrivals, aborts and preemptions in one engine, with drafts of random length, half of which are wrong.

Usage: fuzz_run.py JOB.json, the job with `llm` (vLLM's arguments), `sequences` (prompt and reference continuation),
`lengths` (of the prompts), `seconds`, `seed`, and the probabilities of `arrivals` and `aborts` in a step. It goes on
for up to four times as long while nothing has been aborted, preempted or finished. Prints a line and ends with 0 if
every token was the reference's and every block is free again at the end.
"""

import json
import os
import random
import sys
import time

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the scheduler in this process, whose blocks are counted


def main() -> None:
    from vllm import EngineArgs, SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.llm_engine import LLMEngine

    with open(sys.argv[1]) as f:
        job = json.load(f)
    rng = random.Random(job["seed"])
    engine = LLMEngine.from_engine_args(EngineArgs(**job["llm"]))
    pool = engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    running: dict[str, tuple[int, int]] = {}  # request -> its sequence and how many tokens it has got
    counts = {"asked": 0, "finished": 0, "aborted": 0, "tokens": 0}
    began = time.monotonic()

    def preempted() -> int:
        return {m.name: m.value for m in engine.get_metrics() if hasattr(m, "value")}["vllm:num_preemptions"]

    def more() -> bool:
        took = (time.monotonic() - began) / job["seconds"]
        return took < 1 or (took < 4 and not (counts["finished"] and counts["aborted"] and preempted()))

    while (asking := more()) or running:
        if asking and len(running) < 10 and rng.random() < job["arrivals"]:
            which = rng.randrange(len(job["sequences"]))
            prompt = job["lengths"][which]
            new = rng.randint(1, len(job["sequences"][which]) - prompt)
            sampling = SamplingParams(
                temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
            )
            name = str(counts["asked"])
            tokens = TokensPrompt(prompt_token_ids=job["sequences"][which][:prompt])
            engine.add_request(name, tokens, sampling)
            running[name] = which, 0
            counts["asked"] += 1
        if running and rng.random() < job["aborts"]:
            name = rng.choice(sorted(running))
            engine.abort_request([name])
            del running[name]
            counts["aborted"] += 1
        for out in engine.step():
            if out.request_id not in running:
                continue
            which, got = running[out.request_id]
            new = list(out.outputs[0].token_ids)
            start = job["lengths"][which] + got
            want = job["sequences"][which][start : start + len(new)]
            assert new == want, f"request {out.request_id}, sequence {which}, after {got} tokens: {new}, not {want}"
            running[out.request_id] = which, got + len(new)
            counts["tokens"] += len(new)
            if out.finished:
                del running[out.request_id]
                counts["finished"] += 1
    for _ in range(20):  # what was aborted is freed by a later step
        engine.step()
    left = free - pool.get_num_free_blocks()
    assert left == 0, f"{left} blocks were never freed"
    print(f"no divergence, no leaked block: {counts}, preempted {preempted()}")


if __name__ == "__main__":
    main()
