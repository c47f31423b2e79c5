"""Samples two tokens after one prompt many times and counts the second.

Usage: sample_run.py JOB.json RESULT.json, the job with `llm` (vLLM's arguments), `prompt`, `samples` and `vocab`."""

import json
import sys

REQUEST = 100  # samples of a request


def main() -> None:
    from vllm import LLM, SamplingParams, TokensPrompt

    with open(sys.argv[1]) as f:
        job = json.load(f)
    llm = LLM(**job["llm"])
    sampling = SamplingParams(n=REQUEST, temperature=1, max_tokens=4, ignore_eos=True, detokenize=False)
    counts = [0] * job["vocab"]
    requests = [TokensPrompt(prompt_token_ids=job["prompt"])] * (job["samples"] // REQUEST)
    for out in llm.generate(requests, sampling, use_tqdm=False):
        for sample in out.outputs:
            counts[sample.token_ids[1]] += 1
    counters = {m.name.removeprefix("vllm:"): m.value for m in llm.get_metrics() if hasattr(m, "value")}
    with open(sys.argv[2], "w") as f:
        json.dump({"counts": counts, "counters": counters}, f)


if __name__ == "__main__":
    main()
