"""What speculation and several GPUs change in greedy decoding: the share of prompts that get the same tokens as on one
GPU without drafts.

    PYTHONPATH=. python benchmarks/serving/equal.py [--systems heads,groups,stock] [--dtypes float32,bfloat16]
                                                    [--drafts 4,8] [--tensor-parallel-size 1,2] [--out equal.csv]

Small random models of two attention layers and two mixers: ours with a state per query head or per KV head, and the
same with vLLM's Mamba-2 mixer. 64 prompts of 1 to 4,000 tokens, 256 new ones, 16 sequences at once, CUDA graphs, Model
Runner V2; two rounds, so that recycled slots count. Drafts are by ngram, or with "model-4" by a hybrid of the same kind
whose matrices are off by 3 %.

For each pair the table gives the share of equal prompts and, where a prompt parts, how far the best two logits were
apart at that token without drafts: rounding parts only ties, a wrong state parts anything. The exit status is 1 if
tokens of ours changed in fp32 on one GPU; on several, which add in another order, where the gap is above 0.001; or in
bf16 where it is above --tie: these logits reach 32, where bf16 has steps of 0.125, and a step with drafts multiplies
matrices of other shapes than one without. Several GPUs sum as in decode.py. A row is in the CSV as soon as it is there,
and rows that are there are not measured again.

A trial on a CPU: --eager --dtypes float32 --drafts 4 --prompts 4 --new 16 --longest 200 --at-once 1.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from engines import environment, load, parallel, plugin, save

VOCAB = 512
SYSTEMS, DTYPES = ("heads", "groups", "stock"), ("float32", "bfloat16")
COLUMNS = ("system", "dtype", "drafts", "gpus", "equal", "prompts", "accepted", "largest_gap", "median_gap", "gpu")
NOISE = 1e-3  # gap of fp32 logits up to which another order of sums may part
HEADS, GROUPS, WIDTH, HIDDEN = 4, 2, 32, 128


def asked(count: int, longest: int) -> list[list[int]]:
    """Prompts of all lengths, every eighth of which repeats itself, so that ngrams are found."""
    rng = random.Random(0)
    lengths = [1, 2, longest] + [int(longest ** rng.random()) for _ in range(count - 3)]
    result = [[rng.randrange(3, VOCAB) for _ in range(n)] for n in lengths]
    for i in range(0, count, 8):
        n = len(result[i])
        result[i] = (result[i][: max(n // 3, 1)] * 4)[:n]
    return result


def write_stock(out: Path) -> Path:
    """A model with vLLM's Mamba-2 mixer, random weights whose logits are well apart and half-lives as ours have."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    inner, state = HEADS * WIDTH, HEADS * WIDTH
    weights = {"model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN), "model.norm.weight": torch.ones(HIDDEN)}
    weights["lm_head.weight"] = torch.randn(VOCAB, HIDDEN) * 0.7

    def matrix(rows: int, columns: int):
        return torch.randn(rows, columns) * 1.2 / columns**0.5

    kinds = ["full_attention", "linear_attention", "linear_attention", "full_attention"]
    for i, kind in enumerate(kinds):
        p = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{p}{name}.weight"] = torch.ones(HIDDEN)
        weights |= {f"{p}mlp.{name}_proj.weight": matrix(2 * HIDDEN, HIDDEN) for name in ("gate", "up")}
        weights[f"{p}mlp.down_proj.weight"] = matrix(HIDDEN, 2 * HIDDEN)
        if kind == "full_attention":
            weights |= {f"{p}self_attn.{name}_proj.weight": matrix(GROUPS * WIDTH, HIDDEN) for name in "kv"}
            weights |= {f"{p}self_attn.{name}_proj.weight": matrix(HIDDEN, HIDDEN) for name in "qo"}
            continue
        weights |= {
            f"{p}mixer.in_proj.weight": matrix(2 * inner + 2 * state + HEADS, HIDDEN),
            f"{p}mixer.conv1d.weight": torch.randn(inner + 2 * state, 1, 4) * 0.5,
            f"{p}mixer.conv1d.bias": torch.zeros(inner + 2 * state),
            f"{p}mixer.A": torch.rand(HEADS) * -4 - 1,  # log of the decay, as checkpoints have it
            f"{p}mixer.D": torch.ones(HEADS),
            f"{p}mixer.dt_bias": torch.randn(HEADS) * 0.2,
            f"{p}mixer.norm.weight": torch.ones(inner),
            f"{p}mixer.out_proj.weight": matrix(HIDDEN, inner),
        }
    config = {
        "model_type": "mamba_hybrid", "architectures": ["StockHybrid"], "layer_types": kinds, "vocab_size": VOCAB,
        "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": 4, "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS, "head_dim": WIDTH, "max_position_embeddings": 8192, "mamba_chunk_size": 256,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    save_file(weights, out / "model.safetensors")
    return out


def generate(job: dict) -> dict:
    """Tokens of each round, the gaps between the best two logits, and the share of drafts that was accepted."""
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(**job["llm"])
    sampling = SamplingParams(temperature=0, max_tokens=job["new"], ignore_eos=True, detokenize=False, logprobs=2)
    prompts = [TokensPrompt(prompt_token_ids=p) for p in job["prompts"]]
    rounds, gaps = [], []
    for _ in range(2):
        outs = [out.outputs[0] for out in llm.generate(prompts, sampling, use_tqdm=False)]
        rounds.append([list(out.token_ids) for out in outs])
        best = [[sorted((p.logprob for p in place.values()), reverse=True) for place in out.logprobs] for out in outs]
        gaps.append([[two[0] - two[1] for two in prompt] for prompt in best])
    counters = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    drafted = counters.get("vllm:spec_decode_num_draft_tokens", 0)
    accepted = counters["vllm:spec_decode_num_accepted_tokens"] / drafted if drafted else None
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"rounds": rounds, "gaps": gaps, "accepted": accepted, "gpu": name}


def run(model: Path, dtype: str, drafts: str, gpus: int, folder: Path, args: argparse.Namespace) -> dict | str:
    """What one engine generated, in a process of its own; the end of its log if it failed."""
    llm = {
        "model": str(model), "dtype": dtype, "skip_tokenizer_init": True, "max_model_len": args.longest + args.new,
        "max_num_seqs": 16, "max_num_batched_tokens": 512, "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.05, "num_gpu_blocks_override": 4000, "disable_log_stats": False,
        "mamba_ssm_cache_dtype": "float32", "enforce_eager": args.eager,
    } | parallel(gpus)  # fmt: skip
    method, _, number = drafts.rpartition("-")
    if method == "model":
        llm["speculative_config"] = {
            "method": "draft_model", "num_speculative_tokens": int(number),
            "model": str(model.with_name(f"{model.name}-draft")),
        }  # fmt: skip
    elif drafts != "0":
        llm["speculative_config"] = {
            "method": "ngram", "num_speculative_tokens": int(number), "prompt_lookup_max": 2, "prompt_lookup_min": 1,
        }  # fmt: skip
    file = folder / f"{model.name}-{dtype}-{drafts}-{gpus}.json"
    # vLLM's Triton attention rounds fp32 to tf32 unless Triton is told otherwise
    switches = {"TRITON_F32_DEFAULT": "ieee", "VLLM_LOGGING_LEVEL": "WARNING"}
    if torch.cuda.is_available():
        switches["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    job = {"llm": llm, "file": str(file), "prompts": asked(args.prompts, args.longest), "new": args.new}
    file.with_suffix(".job").write_text(json.dumps(job))
    command = [sys.executable, __file__, "--one", str(file.with_suffix(".job"))]
    with file.with_suffix(".log").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=log, env=environment(folder, **switches)).returncode
    if code:
        lines = file.with_suffix(".log").read_text().splitlines()
        return "\n".join([line for line in lines if "Error" in line][:5] + lines[-5:])
    return json.loads(file.read_text())


def compare(plain: dict, drafted: dict) -> dict:
    """A row of the table."""
    gaps, equal = [], 0
    for tokens, answers, gap in zip(drafted["rounds"], plain["rounds"], plain["gaps"], strict=True):
        for mine, theirs, apart in zip(tokens, answers, gap, strict=True):
            equal += mine == theirs
            if mine != theirs:
                gaps.append(next(g for g, a, b in zip(apart, mine, theirs, strict=True) if a != b))
    gaps.sort()
    accepted = drafted["accepted"]
    return {
        "equal": equal, "prompts": sum(map(len, plain["rounds"])), "gpu": plain["gpu"],
        "accepted": None if accepted is None else round(accepted, 3),
        "largest_gap": float(f"{gaps[-1]:.3g}") if gaps else None,
        "median_gap": float(f"{gaps[len(gaps) // 2]:.3g}") if gaps else None,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, values in (("systems", SYSTEMS), ("dtypes", DTYPES), ("drafts", ("4", "8"))):
        parser.add_argument(f"--{name}", type=lambda text: text.split(","), default=list(values))
    parser.add_argument("--tensor-parallel-size", type=lambda text: [int(n) for n in text.split(",")], default=[1])
    for name, value in (("prompts", 64), ("new", 256), ("longest", 4000)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, help="CSV to write, or to go on with")
    parser.add_argument("--tie", type=float, default=0.5, help="gap of logits up to which bf16 may part (0.5)")
    parser.add_argument("--at-once", type=int, default=9, help="engines side by side")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        job = json.loads(Path(args.one).read_text())
        Path(job["file"]).write_text(json.dumps(generate(job)))
        return 0
    from tests.vllm_plugin.tiny_hybrid import write_hybrid, write_noisy

    rows = load(args.out)
    have = {(row["system"], row["dtype"], row["drafts"], int(row["gpus"])) for row in rows}
    pairs = [(s, t) for s in args.systems for t in args.dtypes]
    others = [(d, n) for n in args.tensor_parallel_size for d in ("0", *args.drafts) if (d, n) != ("0", 1)]
    # vLLM's mixer cannot draft
    wanted = {
        (s, t): [(d, n) for d, n in others if (s, t, d, n) not in have and not (s == "stock" and "model" in d)]
        for s, t in pairs
    }
    failed = False
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(args.at_once) as pool:
        folder = plugin(Path(name))
        models = {}
        for system in args.systems:
            if system == "stock":
                models[system] = write_stock(folder / system)
            else:
                states = {"heads": "heads", "groups": "shared"}[system]
                models[system] = write_hybrid(folder / system, states, max_position_embeddings=8192)
                write_noisy(folder / f"{system}-draft", models[system], 0.03)
        # the first of each pair is what the others are compared with
        engines = {
            (system, dtype): {
                other: pool.submit(run, models[system], dtype, *other, folder, args) for other in (("0", 1), *left)
            }
            for (system, dtype), left in wanted.items()
            if left
        }
        for (system, dtype), of_pair in engines.items():
            for (drafts, gpus), engine in of_pair.items():
                result, plain = engine.result(), of_pair["0", 1].result()
                if isinstance(result, str):
                    print(f"{system}, {dtype}, {drafts} drafts on {gpus} failed: {result}", flush=True)
                    failed = True
                if (drafts, gpus) == ("0", 1) or isinstance(result, str) or isinstance(plain, str):
                    continue
                row = {"system": system, "dtype": dtype, "drafts": drafts, "gpus": gpus} | compare(plain, result)
                rows.append(row)
                print(json.dumps(row), flush=True)
                if args.out:
                    save(args.out, COLUMNS, rows)
    return int(failed or any(changed(row, args.tie) for row in rows))


def changed(row: dict, tie: float) -> bool:
    """Whether tokens of ours are others than they should be; a row as it was made, or as text out of a CSV."""
    limit = tie if row["dtype"] != "float32" else NOISE if int(row["gpus"]) > 1 else 0
    return row["system"] != "stock" and row["largest_gap"] not in (None, "") and float(row["largest_gap"]) > limit


if __name__ == "__main__":
    sys.exit(main())
