"""Starts one vLLM engine, lets it generate, writes its tokens, counters and slots.

Usage: engine_run.py JOB.json RESULT.json, the job with the keys `llm` (vllm.LLM's arguments), `prompts` (token ids),
`new`, `rounds` and, if there are some, `adapters` (a LoRA adapter's directory or null for each prompt).
"""

import json
import sys


def slots(worker):
    """What the mixer layers ask of the cache, and what the model's class methods say of it."""
    model, config = worker.get_model(), worker.vllm_config

    def plain(shapes, dtypes):
        return [[list(shape), str(dtype)] for shape, dtype in zip(shapes, dtypes, strict=True)]

    mixers = {n: s for n, s in worker.get_kv_cache_spec().items() if n.endswith(".mixer")}
    return {
        "layers": {name: plain(spec.shapes, spec.dtypes) for name, spec in mixers.items()},
        "blocks": [spec.num_speculative_blocks for spec in mixers.values()],
        "class": plain(
            type(model).get_mamba_state_shape_from_config(config), type(model).get_mamba_state_dtype_from_config(config)
        ),
    }


if __name__ == "__main__":
    from prometheus_client import REGISTRY
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    with open(sys.argv[1]) as f:
        job = json.load(f)
    llm = LLM(**job["llm"])
    adapters = job.get("adapters") or [None] * len(job["prompts"])
    numbers = {path: n for n, path in enumerate(dict.fromkeys(a for a in adapters if a), 1)}
    lora = [LoRARequest(f"adapter-{numbers[path]}", numbers[path], path) if path else None for path in adapters]
    sampling = SamplingParams(temperature=0, max_tokens=job["new"], ignore_eos=True, detokenize=False)
    rounds = [
        [
            list(out.outputs[0].token_ids)
            for out in llm.generate(
                [TokensPrompt(prompt_token_ids=p) for p in job["prompts"]], sampling, use_tqdm=False, lora_request=lora
            )
        ]
        for _ in range(job["rounds"])
    ]
    counters = {m.name.removeprefix("vllm:"): m.value for m in llm.get_metrics() if hasattr(m, "value")}
    samples = [s for metric in REGISTRY.collect() for s in metric.samples if s.name.startswith("mamba_hybrid:")]
    states = {f"{s.name}{s.labels.get('le', '')}{s.labels.get('phase', '')}": s.value for s in samples}
    result = {"rounds": rounds, "counters": counters, "states": states, "slots": llm.collective_rpc(slots)[0]}
    with open(sys.argv[2], "w") as f:
        json.dump(result, f)
