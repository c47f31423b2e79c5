"""Starts one vLLM engine, asks it for its prompts' log-probabilities, writes them and what its model holds.

Usage: weights_run.py JOB.json RESULT.pt, the job with the keys `llm` (vllm.LLM's arguments) and `prompts` (token ids).
The result has `logprobs` (of each prompt's own tokens from the second on), `parameters` (all, as they are stored; of
torchao's classes the inner integers or floats) and `matrices` (what each linear layer does to the identity: its weight
as it is used, quantised or not).
"""

import io
import json
import sys

import torch


def held(worker):
    """Parameters and matrices of the worker's model, as bytes."""
    from vllm.model_executor.layers.linear import LinearBase

    model, dtype = worker.get_model(), worker.vllm_config.model_config.dtype
    parameters, matrices = {}, {}
    for name, p in model.named_parameters():
        stored = p
        for inner in ("original_weight_tensor", "tensor_impl", "int_data", "qdata"):
            stored = getattr(stored, inner, stored)
        parameters[name] = torch.empty_like(stored).copy_(stored)
    for name, layer in model.named_modules():
        if isinstance(layer, LinearBase):
            identity = torch.eye(layer.input_size_per_partition, dtype=dtype)
            with torch.inference_mode(False), torch.no_grad():
                matrices[name] = layer.quant_method.apply(layer, identity, None).t().contiguous()
    file = io.BytesIO()
    torch.save((parameters, matrices), file)
    return file.getvalue()


if __name__ == "__main__":
    from vllm import LLM, SamplingParams, TokensPrompt

    with open(sys.argv[1]) as f:
        job = json.load(f)
    llm = LLM(**job["llm"])
    parameters, matrices = torch.load(io.BytesIO(llm.collective_rpc(held)[0]))
    sampling = SamplingParams(temperature=0, max_tokens=1, detokenize=False, prompt_logprobs=0)
    outs = llm.generate([TokensPrompt(prompt_token_ids=p) for p in job["prompts"]], sampling, use_tqdm=False)
    logprobs = [
        [entry[t].logprob for entry, t in zip(out.prompt_logprobs[1:], out.prompt_token_ids[1:], strict=True)]
        for out in outs
    ]
    torch.save({"logprobs": logprobs, "parameters": parameters, "matrices": matrices}, sys.argv[2])
