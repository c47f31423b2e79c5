"""`mamba-hybrid generate`: answers to a file of prompts, in batches, resumable."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba_hybrid.errors import UserError

from .training_set import TrainingSet, record_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.v1.engine.llm_engine import LLMEngine

    from .results import Results
    from .rows import Row

# requests given to the engine at a time, in batches: enough that it never waits for one
AHEAD = 4
LOG_SECONDS = 10  # between two states of the progress bar in a log


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments. Imports nothing heavy."""
    p = parser
    p.add_argument("model", metavar="DIR", help="checkpoint")
    p.add_argument(
        "--input", required=True, metavar="FILE", help='.jsonl: {"prompt": ...} or {"messages": [...]}, and "id"'
    )
    p.add_argument("--output", required=True, metavar="FILE", help=".jsonl to append to; its rows are not asked again")
    p.add_argument("--overwrite", action="store_true", help="start --output again")
    p.add_argument("--n", type=int, default=1, help="answers to a row (1)")
    p.add_argument("--max-tokens", type=int, default=256, help="longest answer (256)")
    p.add_argument("--temperature", type=float, default=0.0, help="0 takes the best token (0)")
    p.add_argument("--top-p", type=float, default=1.0, help="sample from the tokens that make up this share (1)")
    p.add_argument("--top-k", type=int, default=0, help="sample from the best k tokens, 0 from all (0)")
    p.add_argument("--seed", type=int, default=0, help="of the sampling; a row's answers depend on it and its id (0)")
    p.add_argument("--max-model-len", type=int, metavar="N", help="context (the model's)")
    p.add_argument("--batch", type=int, default=256, help="sequences in flight (256); fewer where memory holds fewer")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="(the model's)")
    p.add_argument("--enforce-eager", action="store_true", help="do not compile: starts sooner, runs slower")
    p.add_argument("--skip-long", action="store_true", help="leave out rows that do not fit into the context")
    p.add_argument(
        "--training-set",
        metavar="FILE",
        help=".jsonl to write in the end: a conversation for each answer that is whole, as chat_dataset reads them",
    )
    p.add_argument("--speculative-config", metavar="JSON", help="vLLM's speculative_config")


def run(args: argparse.Namespace) -> int:
    """Answer the rows of --input that --output does not have.

    Returns:
        0.

    Raises:
        UserError: anything wrong with the checkpoint, a row, a setting or the output, before the engine is started;
            or the engine refuses to start.
    """
    from mamba_hybrid.source import load_tokenizer

    from .checkpoint import check_servable
    from .results import Results
    from .rows import read_rows

    speculative = _check_settings(args)
    _check_files(args)
    config = check_servable(args.model)
    context = _context(args, config)
    rows = read_rows(args.input, load_tokenizer(Path(args.model)))
    fitting = [row for row in rows if len(row.tokens) + args.max_tokens <= context]
    if len(fitting) < len(rows) and not args.skip_long:
        long = next(row for row in rows if len(row.tokens) + args.max_tokens > context)
        raise UserError(
            f"{args.input}, line {long.line}: a prompt of {len(long.tokens)} tokens and --max-tokens "
            f"{args.max_tokens} are over the context of {context}; shorten it, lower --max-tokens or use --skip-long"
        )
    if not fitting:
        raise UserError(
            f"--skip-long leaves out all rows of {args.input}: with --max-tokens {args.max_tokens} none fits into the "
            f"context of {context}; lower --max-tokens"
        )
    settings = _settings(args)
    training = None
    if args.training_set is not None:
        if prompt := next((row for row in rows if "messages" not in row.data), None):
            raise UserError(
                f"{args.input}, line {prompt.line} has a 'prompt': a --training-set of conversations needs 'messages'"
            )
        if ended := next((row for row in rows if row.data["messages"][-1]["role"] == "assistant"), None):
            raise UserError(f"{args.input}, line {ended.line} ends with a turn of the assistant: there is none to add")
        training = TrainingSet(args.training_set, settings | {"model": args.model}, overwrite=args.overwrite)
    with Results(args.output, settings, {row.id: row.data for row in rows}, overwrite=args.overwrite) as results:
        todo = [row for row in fitting if row.id not in results.done]
        if todo:
            _answer(args, todo, len(fitting), context, speculative, results)
    if training is not None:
        whole, cut = training.write(args.output, [row.id for row in rows])
        print(
            f"{whole} conversations, {cut} answers cut off at --max-tokens left out; {training.path}", file=sys.stderr
        )
    skipped = len(rows) - len(fitting)
    print(
        f"{len(todo)} rows answered, {len(fitting) - len(todo)} were there"
        + (f", {skipped} skipped as too long" if skipped else "")
        + f"; {args.output}",
        file=sys.stderr,
    )
    return 0


def fingerprint(model: str | Path) -> str:
    """16 hex digits that tell checkpoints apart: of the small files whole, of the weights their size and samples."""
    digest = hashlib.sha256()
    for file in sorted(Path(model).iterdir()):
        if file.suffix not in (".json", ".safetensors", ".model", ".jinja") or not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as f:
            if size < 2**24:
                digest.update(f.read())
                continue
            for i in range(64):
                f.seek(size * i // 64)
                digest.update(f.read(2**14))
    return digest.hexdigest()[:16]


def _check_settings(args: argparse.Namespace) -> dict[str, Any] | None:
    """The speculative configuration, if any; raises for a value out of its range."""
    for flag, value, least in (
        ("--n", args.n, 1),
        ("--max-tokens", args.max_tokens, 1),
        ("--batch", args.batch, 1),
        ("--top-k", args.top_k, 0),
        ("--seed", args.seed, 0),
    ):
        if not value >= least:
            raise UserError(f"{flag} {value} must be at least {least}")
    if not 0 <= args.temperature < math.inf:
        raise UserError(f"--temperature {args.temperature} must be a number of at least 0")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p {args.top_p} must be above 0 and at most 1")
    if args.n > 1 and args.temperature == 0:
        raise UserError(f"--n {args.n} answers at --temperature 0 are all the same; raise --temperature")
    if args.speculative_config is None:
        return None
    try:
        speculative = json.loads(args.speculative_config)
    except ValueError as e:
        raise UserError(f"--speculative-config is no JSON: {e}") from e
    if not isinstance(speculative, dict):
        raise UserError(f"--speculative-config {args.speculative_config} is no JSON object")
    return speculative


def _check_files(args: argparse.Namespace) -> None:
    """Raises where one of the files would be written over another."""
    files = {"--input": args.input, "--output": args.output}
    if args.training_set is not None:
        files |= {"--training-set": args.training_set, "the record of --training-set": record_of(args.training_set)}
    seen: dict[str, str] = {}
    for name, file in files.items():
        if (other := seen.setdefault(os.path.realpath(file), name)) != name:
            raise UserError(f"{name} {file} is {other} too; give another file")


def _context(args: argparse.Namespace, config: PretrainedConfig) -> int:
    limit = config.max_position_embeddings
    context = limit if args.max_model_len is None else args.max_model_len
    if not 1 <= context <= limit:
        raise UserError(f"--max-model-len {context} must be between 1 and the model's context of {limit}")
    return context


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What shapes the answers. Batch, compilation and speculation are left out: they change speed only."""
    names = ("n", "max_tokens", "temperature", "top_p", "top_k", "seed", "dtype")
    return {"checkpoint": fingerprint(args.model)} | {name: getattr(args, name) for name in names}


def row_seed(seed: int, id: str | int) -> int:
    """Seed of a row's sampling, the same whatever else is asked and however often the run is resumed."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, id]).encode()).digest()[:4], "big")


def _start(args: argparse.Namespace, batch: int, context: int, speculative: dict[str, Any] | None) -> LLMEngine:
    from .checkpoint import engine_environment

    os.environ |= engine_environment()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # its hundred lines would break the progress bar

    from vllm import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    scheduling: dict[str, Any] = {"enable_prefix_caching": False} if speculative else {}
    if args.temperature > 0 and current_platform.is_cpu():
        # vLLM 0.32 steps a seeded request's generator back when its prompt is read in pieces, which PyTorch's CPU
        # generator cannot: read prompts whole
        scheduling = {
            "enable_prefix_caching": False,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(context, batch),
        }
    try:
        return LLMEngine.from_engine_args(
            EngineArgs(
                model=args.model,
                dtype=args.dtype,
                max_model_len=context,
                max_num_seqs=batch,
                enforce_eager=args.enforce_eager,
                speculative_config=speculative,
                disable_log_stats=True,
                **scheduling,
            )
        )
    except (ValueError, RuntimeError, AssertionError, NotImplementedError) as e:
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        # pydantic puts a heading before the reason
        reason = " ".join(lines[:3]) if lines else type(e).__name__
        given = f"--batch {batch}" + (f", --speculative-config {json.dumps(speculative)}" if speculative else "")
        raise UserError(f"the engine does not start with {given}: {reason}") from e


def _answer(
    args: argparse.Namespace,
    todo: list[Row],
    total: int,
    context: int,
    speculative: dict[str, Any] | None,
    results: Results,
) -> None:
    """Ask the engine, writing each row when its last answer is there."""
    batch = min(args.batch, args.n * len(todo))  # of few the engine captures fewer CUDA graphs
    engine = _start(args, batch, context, speculative)

    from tqdm import tqdm
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    waiting = iter(todo)
    asked: dict[str, Row] = {}
    tokens = 0
    try:
        with tqdm(
            desc="rows",
            total=total,
            initial=total - len(todo),
            unit="row",
            mininterval=0.1 if sys.stderr.isatty() else LOG_SECONDS,
        ) as bar:
            while True:
                while len(asked) < AHEAD * batch and (row := next(waiting, None)) is not None:
                    sampling = SamplingParams(
                        n=args.n,
                        max_tokens=args.max_tokens,
                        temperature=args.temperature,
                        top_p=args.top_p,
                        top_k=args.top_k,
                        seed=row_seed(args.seed, row.id),
                        output_kind=RequestOutputKind.FINAL_ONLY,
                    )
                    asked[str(row.line)] = row
                    (prompt,) = engine.renderer.render_cmpl([TokensPrompt(prompt_token_ids=row.tokens)])
                    engine.add_request(str(row.line), prompt, sampling)
                if not asked:
                    break
                for out in engine.step():
                    if not out.finished:
                        continue
                    row = asked.pop(out.request_id)
                    answers = sorted(out.outputs, key=lambda answer: answer.index)
                    results.append(
                        {
                            "id": row.id,
                            "input": row.data,
                            "model": args.model,
                            "prompt_tokens": len(row.tokens),
                            "outputs": [
                                {"text": a.text, "finish_reason": a.finish_reason, "tokens": len(a.token_ids)}
                                for a in answers
                            ],
                        }
                    )
                    tokens += sum(len(a.token_ids) for a in answers)
                    if elapsed := bar.format_dict["elapsed"]:
                        bar.set_postfix_str(f"{tokens / elapsed:.0f} tok/s", refresh=False)
                    bar.update()
    finally:
        engine.engine_core.shutdown(timeout=30)
