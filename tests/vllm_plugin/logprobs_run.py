"""Starts one vLLM engine and writes the log-probabilities of its prompts' own tokens from the second on.

Usage: logprobs_run.py JOB.json RESULT.json, the job with the keys `llm` (vllm.LLM's arguments), `prompts` (token ids)
and `adapters` (a LoRA adapter's directory or null for each prompt).
"""

import json
import sys

if __name__ == "__main__":
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    with open(sys.argv[1]) as f:
        job = json.load(f)
    llm = LLM(**job["llm"])
    numbers = {path: n for n, path in enumerate(dict.fromkeys(a for a in job["adapters"] if a), 1)}
    lora = [LoRARequest(f"adapter-{numbers[p]}", numbers[p], p) if p else None for p in job["adapters"]]
    sampling = SamplingParams(temperature=0, max_tokens=1, detokenize=False, prompt_logprobs=0)
    asked = [TokensPrompt(prompt_token_ids=p) for p in job["prompts"]]
    result = [
        [entry[t].logprob for entry, t in zip(out.prompt_logprobs[1:], out.prompt_token_ids[1:], strict=True)]
        for out in llm.generate(asked, sampling, use_tqdm=False, lora_request=lora)
    ]
    with open(sys.argv[2], "w") as f:
        json.dump(result, f)
