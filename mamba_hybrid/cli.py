"""The `mamba-hybrid` command."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .errors import UserError
from .version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns 0, or 1 after printing one `error:` line, 130 after Ctrl-C. SIGTERM raises SystemExit
    with 143."""
    args = parse(argv)
    # as Ctrl-C does, so that directories that are half written go, and an engine's processes end
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        return args.run(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated(*_: Any) -> NoReturn:
    sys.exit(143)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """A command's arguments; ends the process where they are wrong, as argparse does."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    changes = [word for word in rest if word[:1] == "~" or ("=" in word and not word.startswith("-"))]
    if changes != rest or (rest and not hasattr(args, "overrides")):
        hint = "; flags of vllm serve stand behind DIR" if args.command == "serve" else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    if rest:  # key=value behind flags, which argparse does not put together
        args.overrides += rest
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mamba-hybrid", description="Transformers into attention-SSM hybrids.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_convert(commands.add_parser("convert", help="make a hybrid of a Llama, Mistral or Qwen2"))
    _add_inspect(commands.add_parser("inspect", help="layers, parameters, bytes of a sequence"))
    _add_compare(commands.add_parser("compare", help="KL of students from their teacher on a text"))
    _add_plan(commands.add_parser("plan", help="memory and time of a recipe, before anything is run"))
    _add_report(commands.add_parser("report", help="curves and a summary of training runs"))
    _add_draft(commands.add_parser("draft", help="a drafter for a model: a few of its layers, to be distilled"))
    _add_import(commands.add_parser("import", help="a GGUF file as a Hugging Face directory"))
    _add_serve(commands.add_parser("serve", help="an OpenAI-compatible server (vLLM with our plugin)"))
    _add_generate(commands.add_parser("generate", help="answers to a file of prompts, resumable"))
    _add_run(commands.add_parser("run", help="a pipeline of commands and recipes, resumable"))
    _add_bench(commands.add_parser("bench", help="a model, its drafter and others under vLLM's load generator"))
    return parser


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layer numbers such as 1,3,5") from None


def _add_convert(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", metavar="SRC", help="Hugging Face directory or .gguf file; a hybrid keeps its mixers")
    p.add_argument("out", metavar="OUT", help="directory to write; appears only when it is whole")
    which = p.add_mutually_exclusive_group()
    which.add_argument("--layers-from", metavar="FILE", help="layers.json of select_layers: those stay attention")
    which.add_argument("--attention-layers", type=_numbers, metavar="1,3,...", help="layers that stay attention")
    which.add_argument("--keep", type=float, default=0.5, help="share that stays attention, evenly spread (0.5)")
    p.add_argument("--mixers-from", metavar="DIR", help="hybrid whose mixers the converted layers get, as they are")
    p.add_argument("--window", type=int, help="tokens of attention in a mixer (64; 0: pure SSM)")
    p.add_argument("--state-heads", type=int, metavar="N", help="states of a mixer (the query heads)")
    p.add_argument("--short-conv", type=int, choices=(0, 4), help="depthwise convolution in the mixers (0)")
    p.add_argument("--gate", choices=("sigmoid", "silu", "none"), help="gate of the mixers (sigmoid)")
    p.add_argument("--no-ssm-rope", dest="ssm_rope", action="store_const", const=False, help="do not rotate B and C")
    p.add_argument("--max-positions", type=int, help="longest context of the hybrid (the source's)")
    p.add_argument("--calibrate", metavar="TEXT", help=".txt or .jsonl to calibrate on")
    p.add_argument("--column", default="text", help="of a .jsonl TEXT (text)")
    p.add_argument("--calibrate-tokens", type=int, default=16_384, metavar="N", help="tokens of TEXT to use (16384)")
    p.add_argument("--calibrate-length", type=int, default=1024, metavar="N", help="tokens of a sequence (1024)")
    p.add_argument("--calibrate-on", choices=("teacher", "student"), default="teacher", help="whose layer inputs")
    p.add_argument("--ridge", type=float, default=0.1, help="pull of out projections to the attention's (0.1)")
    p.add_argument("--init", choices=("calibrated", "original"), default="calibrated", help="original: the paper's")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="to store in (the source's)")
    p.add_argument("--seed", type=int, default=0, help="of --init original")
    p.add_argument("--device", default="cpu", help="to calibrate on, cpu or cuda (cpu)")
    p.add_argument("--overwrite", action="store_true", help="replace OUT")
    p.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    from .convert import Conversion, convert, format_report, read_layers

    mixer = {
        "window": args.window,
        "state_heads": args.state_heads,
        "short_conv": args.short_conv,
        "gate": args.gate,
        "ssm_rope": args.ssm_rope,
        "max_position_embeddings": args.max_positions,
    }
    layers = args.attention_layers if args.layers_from is None else read_layers(args.layers_from, args.source)
    report = convert(
        Conversion(
            source=args.source,
            out=args.out,
            attention_layers=layers,
            keep=args.keep,
            mixer={k: v for k, v in mixer.items() if v is not None},
            mixers_from=args.mixers_from,
            init=args.init,
            calibrate=args.calibrate,
            column=args.column,
            tokens=args.calibrate_tokens,
            length=args.calibrate_length,
            inputs=args.calibrate_on,
            ridge=args.ridge,
            dtype=args.dtype,
            overwrite=args.overwrite,
            seed=args.seed,
            device=args.device,
        )
    )
    print(format_report(report))
    print(f"wrote {args.out}")
    return 0


def _add_inspect(p: argparse.ArgumentParser) -> None:
    p.add_argument("path", metavar="DIR", help="checkpoint")
    p.add_argument("--context", type=int, help="tokens of the sequence (the model's limit)")
    p.add_argument("--drafts", type=int, default=0, help="drafted tokens of a speculative step (0)")
    p.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    from .inspect import inspect

    print(inspect(args.path, context=args.context, drafts=args.drafts))
    return 0


def _add_compare(p: argparse.ArgumentParser) -> None:
    p.add_argument("teacher", metavar="TEACHER")
    p.add_argument("students", metavar="STUDENT", nargs="+", help="later ones are compared with the first")
    p.add_argument("--text", required=True, help=".txt or .jsonl")
    p.add_argument("--column", default="text", help="of a .jsonl text (text)")
    p.add_argument("--tokens", type=int, default=20_000, help="tokens of the text (20000)")
    p.add_argument("--length", type=int, default=1024, help="tokens of a sequence (1024)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="to compute in (float32)")
    p.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    p.add_argument("--json", metavar="FILE", help="write the figures, passages included")
    p.set_defaults(run=_compare)


def _compare(args: argparse.Namespace) -> int:
    import torch

    from .compare import compare, format_distances
    from .output import check_output, write_output

    if args.json:
        check_output("--json", args.json)
    distances = compare(
        args.teacher,
        args.students,
        args.text,
        tokens=args.tokens,
        length=args.length,
        column=args.column,
        dtype=getattr(torch, args.dtype),
        device=args.device,
    )
    print(format_distances(distances))
    if args.json:
        figures = json.dumps({k: dataclasses.asdict(d) for k, d in distances.items()}, indent=1)
        write_output("--json", args.json, figures.encode())
    return 0


def _add_plan(p: argparse.ArgumentParser) -> None:
    p.add_argument("config", metavar="CONFIG", help="a recipe's YAML")
    p.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="as for tune run")
    p.add_argument("--recipe", help="its name (that of the tune run line in CONFIG's header)")
    p.add_argument("--gpus", type=int, help="one for each process (as in that line, else 1)")
    p.add_argument("--gpu-mem", type=float, default=80, metavar="GB", help="memory of a GPU in 10^9 bytes (80)")
    p.add_argument("--student-config", metavar="FILE", help="config.json, where the model is not there yet")
    p.add_argument("--teacher-config", metavar="FILE", help="the same of the teacher")
    p.add_argument("--keep", type=float, help="attention of a student that is not converted yet (0.5; select_layers 0)")
    p.add_argument("--tflops", type=float, default=989, help="of a GPU at most (989: H100 SXM, dense bf16)")
    p.add_argument("--mfu", type=float, default=0.4, help="share of them that is reached (0.4)")
    p.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs joined by --link (8)")
    p.add_argument("--link", type=float, default=300, metavar="GB/s", help="what comes to a GPU from its node (300)")
    p.add_argument("--node-link", type=float, default=50, metavar="GB/s", help="and from other nodes (50: 400 Gb/s)")
    p.add_argument("--hop", type=float, default=5, metavar="US", help="microseconds of an empty message (5)")
    p.add_argument("--disk", type=float, default=10, metavar="GB/s", help="files, of all processes together (10)")
    p.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    try:
        from torchtune_recipes.plan import Speeds, format_plan, plan
    except ImportError as e:
        raise UserError(f"plan needs the recipes' packages ({e}): pip install 'mamba-hybrid[train]'") from e

    speeds = Speeds(args.tflops, args.mfu, args.link, args.node_link, args.hop, args.disk)
    figures = plan(
        args.config,
        args.overrides,
        recipe=args.recipe,
        gpus=args.gpus,
        node=args.gpus_per_node,
        gpu_gb=args.gpu_mem,
        student_config=args.student_config,
        teacher_config=args.teacher_config,
        keep=args.keep,
    )
    print(format_plan(figures, speeds))
    return 0


def _add_report(p: argparse.ArgumentParser) -> None:
    p.add_argument("runs", metavar="RUN", nargs="+", help="a run's output_dir, or its metrics.jsonl")
    p.add_argument("--out", metavar="FILE", help="draw the curves: .png, .svg, .pdf or .html")
    p.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    from .report import draw, read_run, summary

    runs = [read_run(path) for path in args.runs]
    print(summary(runs))
    if args.out:
        draw(runs, args.out)
        print(f"wrote {args.out}")
    return 0


def _add_draft(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", metavar="SRC", help="checkpoint of the model to draft for")
    p.add_argument("out", metavar="OUT", help="directory to write; appears only when it is whole")
    which = p.add_mutually_exclusive_group()
    which.add_argument("--layers", type=int, default=2, metavar="N", help="layers to keep, evenly spread (2)")
    which.add_argument("--keep-layers", type=_numbers, metavar="0,15,...", help="layers to keep")
    p.add_argument("--overwrite", action="store_true", help="replace OUT")
    p.set_defaults(run=_draft)


def _draft(args: argparse.Namespace) -> int:
    from .draft import cut

    layers = args.layers if args.keep_layers is None else args.keep_layers
    kept = cut(args.source, args.out, layers=layers, overwrite=args.overwrite)
    print(f"wrote {args.out} with layers {', '.join(map(str, kept))} of {args.source}")
    return 0


def _add_import(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", metavar="FILE.gguf")
    p.add_argument("out", metavar="OUT", help="directory to write; appears only when it is whole")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    p.add_argument("--overwrite", action="store_true", help="replace OUT")
    p.set_defaults(run=_import)


def _import(args: argparse.Namespace) -> int:
    from .importer import import_gguf

    import_gguf(args.source, args.out, dtype=args.dtype, overwrite=args.overwrite)
    print(f"wrote {args.out}")
    return 0


def _add_serve(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="DIR", help="checkpoint")
    p.add_argument("vllm_args", nargs=argparse.REMAINDER, metavar="...", help="flags of `vllm serve`")
    p.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    from vllm_plugin.serve import serve

    return serve(args.model, args.vllm_args)


def _add_generate(p: argparse.ArgumentParser) -> None:
    from vllm_plugin.generate import add_arguments  # light: vLLM itself is imported when it runs

    add_arguments(p)
    p.set_defaults(run=_generate)


def _generate(args: argparse.Namespace) -> int:
    from vllm_plugin.generate import run

    return run(args)


def _add_run(p: argparse.ArgumentParser) -> None:
    p.add_argument("pipeline", metavar="FILE", help=".yaml with the steps; see docs/pipelines.md")
    p.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="of the pipeline's variables")
    p.add_argument("--from", dest="start", metavar="STEP", help="do this step and all after it anew")
    p.add_argument("--dry-run", action="store_true", help="only print the commands")
    p.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    try:
        from .pipeline import run
    except ModuleNotFoundError as e:
        raise UserError(f"pipelines need {e.name}: pip install 'mamba-hybrid[train]'") from e

    return run(args.pipeline, args.overrides, start=args.start, dry_run=args.dry_run)


def _add_bench(p: argparse.ArgumentParser) -> None:
    from vllm_plugin.bench import add_arguments

    add_arguments(p)
    p.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> int:
    from vllm_plugin.bench import run

    return run(args)


if __name__ == "__main__":
    sys.exit(main())
