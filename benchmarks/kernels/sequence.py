"""Time prefill against vLLM, and training against mamba-ssm and fla, of one mixer layer at the shapes of an 8B.

    python benchmarks/kernels/sequence.py --warm [--peers vllm,mamba-ssm,fla]
    python benchmarks/kernels/sequence.py --out sequence.csv [--lengths 2048,8192,32768] [--tasks prefill,training]
                                          [--peers vllm,mamba-ssm,fla] [--limit SECONDS]

Needs one NVIDIA GPU and this project; peers that are installed take part, the others are named and their figures stay
empty:  pip install vllm==0.32.0 mamba-ssm==2.3.1 flash-linear-attention==0.6.0

--warm only runs each peer once: vLLM and mamba-ssm try out their launches for minutes, Triton keeps what they chose
on disk. It can run beside other work, but the choice is fairer to them on a GPU that does nothing else.

Every contender is first checked against the fp32 reference on one sequence of 2,048 tokens, gradients included, then
timed, all taking turns: prefill as a CUDA graph of one prompt, training as a user launches it. The table and what
the project must show come last; the exit status is 1 if anything was wrong or failed, whatever the speeds.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")  # before Triton is imported; pools of processes inherit it

import prompts
import torch
import training
from arguments import names, new_file, numbers, seconds
from claims import Claim
from clock import Captured, Launched, median
from gate import verdict
from peers import NotInstalled
from pool import compile_all
from results import Results

LENGTHS, SECONDS = (2048, 8192, 32768), 60
MOST_LENGTH = 131072
GRAPH_TOKENS = 16384  # tokens that a graph's prefills take together, so that a short one outlasts its launch


@dataclass
class SequenceRow:
    """One contender in one case, without figures unless its status is "ok".

    Args:
        task: prefill or training.
        sequences, length: the case.
        contender, how: the system, and its chunk.
        status: ok, wrong, error or not installed.
        milliseconds, half_iqr: median and half the distance between the quartiles; a peer's with repeating x and B.
        milliseconds_repeated: of a peer on inputs repeated beforehand.
        forward_milliseconds: of training, the forward alone.
        peak_mib, peak_mib_repeated: most memory above what the inputs take, as above.
        to_peer, to_peer_repeated: how many times as fast as the peer at its best chunk (vLLM's prefill, mamba-ssm's
            training) with repeating, and on inputs repeated beforehand.
        memory_to_peer: peak as a share of that peer's least, repeating included.
        problem: what went wrong.
        gpu: the machine.
    """

    task: str
    sequences: int
    length: int
    contender: str
    how: str
    status: str = "ok"
    milliseconds: float | None = None
    half_iqr: float | None = None
    milliseconds_repeated: float | None = None
    forward_milliseconds: float | None = None
    peak_mib: float | None = None
    peak_mib_repeated: float | None = None
    to_peer: float | None = None
    to_peer_repeated: float | None = None
    memory_to_peer: float | None = None
    problem: str = ""
    gpu: str = ""


def failed(row: SequenceRow, problem: Exception) -> SequenceRow:
    """The row of a contender that has no speed."""
    row.status, row.problem = verdict(problem)
    if isinstance(problem, NotInstalled):
        row.status, row.problem = "not installed", str(problem)
        say_once(f"{problem}; its figures stay empty")
    else:
        say_once(f"{row.task}, {row.contender} {row.how}: {row.status}: {row.problem}")
    return row


@functools.cache
def say_once(text: str) -> None:
    """Print what several cases have to say."""
    print(text, flush=True)


def release() -> None:
    """Give back the memory of what is no longer referred to."""
    gc.collect()
    torch.cuda.empty_cache()


def peak_mib(call) -> float:
    """Most memory that a call takes above what is there before it, in MiB."""
    call()
    release()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def prefill_rows(length: int, right: list[type[prompts.Prefiller]], limit: float) -> list[SequenceRow]:
    """Time the prefill of a prompt by the contenders that are right."""
    rows, captured = {}, {}
    for kind in right:
        row = SequenceRow("prefill", 1, length, kind.name, kind.how)
        key = kind.name, kind.how
        try:
            contender, calls = kind(length), max(1, GRAPH_TOKENS // length)
            row.peak_mib = peak_mib(contender.call)
            graphs = {(*key, "call"): Captured([contender.call] * calls)}
            if kind in prompts.PEERS:
                row.peak_mib_repeated = peak_mib(contender.call_repeated)
                graphs[*key, "repeated"] = Captured([contender.call_repeated] * calls)
            captured |= graphs
            rows[key] = row
        except Exception as problem:
            rows[key] = failed(SequenceRow("prefill", 1, length, kind.name, kind.how), problem)
    for (name, how, what), (micros, half) in median(captured, seconds=limit).items():
        fill(rows[name, how], what, micros, half)
    return list(rows.values())


def fill(row: SequenceRow, what: str, micros: float, half: float) -> None:
    """Enter a time where it belongs."""
    if what == "call":
        row.milliseconds, row.half_iqr = micros / 1e3, half / 1e3
    elif what == "repeated":
        row.milliseconds_repeated = micros / 1e3
    else:
        row.forward_milliseconds = micros / 1e3


def training_rows(right: list[training.Trainer], limit: float) -> list[SequenceRow]:
    """Time forward and backward by the contenders that are right."""
    rows, launched = {}, {}
    shared: dict[tuple[int, bool], training.Inputs] = {}  # by state heads, and whether repeated
    for trainer in right:
        key = trainer.name, trainer.how
        row = SequenceRow("training", training.SEQUENCES, training.LENGTH, *key)
        try:
            S = trainer.state_heads
            if (S, False) not in shared:
                shared[S, False] = training.Inputs.draw(training.SEQUENCES, training.LENGTH, S)
            inputs = shared[S, False]
            row.peak_mib = peak_mib(lambda trainer=trainer, inputs=inputs: trainer.step(inputs))
            calls = {
                (*key, "call"): Launched(lambda trainer=trainer, inputs=inputs: trainer.step(inputs)),
                (*key, "forward"): Launched(lambda trainer=trainer, inputs=inputs: trainer.forward(*inputs.leaves)),
            }
            if trainer in training.PEERS:
                if (S, True) not in shared:
                    shared[S, True] = inputs.repeated()
                wide = shared[S, True]
                row.peak_mib_repeated = peak_mib(lambda trainer=trainer, wide=wide: trainer.step(wide))
                calls[*key, "repeated"] = Launched(lambda trainer=trainer, wide=wide: trainer.step(wide))
            launched |= calls
            rows[key] = row
        except Exception as problem:
            row = SequenceRow("training", training.SEQUENCES, training.LENGTH, *key)
            rows[key] = failed(row, problem)
    for (name, how, what), (micros, half) in median(launched, seconds=limit).items():
        fill(rows[name, how], what, micros, half)
    return list(rows.values())


def compare(rows: list[SequenceRow], peer: str) -> None:
    """Fill in what a case's rows say about the peer's."""
    best = [row for row in rows if row.contender == peer and row.status == "ok"]
    if not best:
        return
    least = min(row.milliseconds for row in best)
    repeated = min(row.milliseconds_repeated for row in best)
    memory = min(row.peak_mib for row in best)
    for row in rows:
        if row.status == "ok":
            row.to_peer, row.to_peer_repeated = least / row.milliseconds, repeated / row.milliseconds
            row.memory_to_peer = row.peak_mib / memory


def claims(tasks: tuple[str, ...]) -> list[Claim]:
    """What the project must show in these tasks. vLLM's prefill is given x and B repeated, mamba-ssm repeats them."""
    found = []
    for kind in prompts.OURS if "prefill" in tasks else ():
        found.append(
            Claim(
                f"prefill, {kind.name}: >= 1.5x vLLM on inputs repeated beforehand",
                lambda row, kind=kind: (row.task, row.contender) == ("prefill", kind.name),
                lambda row: row.to_peer_repeated,
                least=1.5,
            )
        )
    for trainer in training.OURS if "training" in tasks else ():

        def about(row: SequenceRow, trainer: training.Trainer = trainer) -> bool:
            return (row.task, row.contender) == ("training", trainer.name)

        text = f"training, {trainer.name}: "
        found.append(Claim(text + ">= 1.3x mamba-ssm", about, lambda row: row.to_peer, least=1.3))
        memory = text + "<= 0.6x mamba-ssm's peak memory"
        found.append(Claim(memory, about, lambda row: row.memory_to_peer, most=0.6))
    return found


def compile_one(task: tuple[str, int]) -> str | None:
    """Compile what the contender of that number needs: one short case of the same divisibility."""
    what, number = task
    try:
        if what == "prefill":
            prompts.OURS[number](prompts.CHECKED).call()
        else:
            trainer = training.OURS[number]
            trainer.step(training.Inputs.draw(1, training.LENGTH, trainer.state_heads))
        torch.cuda.synchronize()
    except Exception as problem:
        return f"{what} {number}: {verdict(problem)[1]}"
    return None


def warm() -> bool:
    """Run each peer once; whether none failed."""
    good = True
    for what in (*prompts.PEERS, *training.PEERS):
        row = SequenceRow("warm", 1, prompts.CHECKED, what.name, what.how)
        try:
            if isinstance(what, training.Trainer):
                what.step(training.Inputs.draw(1, training.LENGTH, what.state_heads))
            else:
                what(prompts.CHECKED).call()
            torch.cuda.synchronize()
            print(f"{what.name} {what.how} is warm", flush=True)
        except Exception as problem:
            good &= failed(row, problem).status == "not installed"
        release()
    return good


def right_prefillers() -> tuple[list[type[prompts.Prefiller]], list[tuple[type[prompts.Prefiller], Exception]]]:
    """Those that compute what they should, and the others with their problems."""
    right, wrong = [], []
    for kind in prompts.OURS + prompts.PEERS:
        try:
            kind(prompts.CHECKED).check()
            right.append(kind)
        except Exception as problem:
            wrong.append((kind, problem))
        release()
    return right, wrong


def right_trainers() -> tuple[list[training.Trainer], list[SequenceRow]]:
    """Those that compute what they should, and a row for each that does not."""
    right, rows = [], []
    for trainer in training.OURS + training.PEERS:
        try:
            trainer.check()
            right.append(trainer)
        except Exception as problem:
            row = SequenceRow("training", training.SEQUENCES, training.LENGTH, trainer.name, trainer.how)
            rows.append(failed(row, problem))
        release()
    return right, rows


def table(rows: list[SequenceRow]) -> list[str]:
    """One line a contender and case."""
    lines = [
        f"{'task':9} {'tokens':>10} {'contender':18} {'how':26} {'ms':>8} {'repeated':>8} {'forward':>8} {'MiB':>7}"
    ]
    for row in rows:
        times = (row.milliseconds, row.milliseconds_repeated, row.forward_milliseconds)
        cells = " ".join(f"{'' if value is None else format(value, '.3f'):>8}" for value in times)
        memory = row.status if row.peak_mib is None else f"{row.peak_mib:.0f}"
        tokens = f"{row.sequences} x {row.length}"
        lines.append(f"{row.task:9} {tokens:>10} {row.contender:18} {row.how:26} {cells} {memory:>7}")
    return lines


def benchmark(out: Path, lengths: tuple[int, ...], tasks: tuple[str, ...], limit: float) -> int:
    """The whole run; its exit status."""
    gpu = torch.cuda.get_device_name()
    ours = {"prefill": prompts.OURS, "training": training.OURS}
    compile_all(compile_one, [(task, i) for task in tasks for i in range(len(ours[task]))], "the kernels")
    print(f"{gpu}, torch {torch.__version__}", flush=True)
    torch.manual_seed(0)
    results, share = Results(out, SequenceRow), limit / (len(lengths) + 1)
    right, wrong = right_prefillers() if "prefill" in tasks else ([], [])
    for length in lengths if "prefill" in tasks else ():
        rows = prefill_rows(length, right, share)
        rows += [failed(SequenceRow("prefill", 1, length, kind.name, kind.how), problem) for kind, problem in wrong]
        add(results, rows, "vllm", gpu)
    if "training" in tasks:
        trainers, rows = right_trainers()
        add(results, training_rows(trainers, share) + rows, training.MambaTrainer.name, gpu)
    results.finish()
    print("\n".join(table(results.rows)))
    for claim in claims(tasks):
        print(claim.judge(results.rows, lambda row: f"{row.sequences} x {row.length} tokens"))
    bad = [row for row in results.rows if row.status in ("wrong", "error")]
    if bad:
        print(f"{len(bad)} contenders were wrong or failed, see the column problem of {out}")
    return 1 if bad else 0


def add(results: Results, rows: list[SequenceRow], peer: str, gpu: str) -> None:
    """A case's rows into the results."""
    compare(rows, peer)
    for row in rows:
        row.gpu = gpu
    results.add(rows)
    release()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=new_file, help="CSV to write")
    parser.add_argument("--lengths", type=numbers(MOST_LENGTH), default=LENGTHS, help="tokens of the prompts")
    parser.add_argument("--limit", type=seconds, default=SECONDS, help="seconds of replays, all cases together")
    parser.add_argument("--tasks", type=names(("prefill", "training")), default=("prefill", "training"))
    parser.add_argument("--peers", type=names(("vllm", "mamba-ssm", "fla")), default=("vllm", "mamba-ssm", "fla"))
    parser.add_argument("--warm", action="store_true", help="only run each peer once")
    args = parser.parse_args()
    for module in (prompts, training):
        module.PEERS = [peer for peer in module.PEERS if peer.name in args.peers]
    if not args.warm and args.out is None:
        parser.error("--out is needed, unless with --warm")
    if not torch.cuda.is_available():
        parser.error("this benchmark needs an NVIDIA GPU, torch finds none")
    if args.warm:
        return 0 if warm() else 1
    return benchmark(args.out, args.lengths, args.tasks, args.limit)


if __name__ == "__main__":
    sys.exit(main())
