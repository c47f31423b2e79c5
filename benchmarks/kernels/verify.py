"""Time decode and verify steps of one mixer layer against vLLM and FlashInfer, at the shapes of an 8B.

    python benchmarks/kernels/verify.py --out results.csv [--batches 1,8,32] [--tokens 1,4] [--limit SECONDS]

Needs one NVIDIA GPU of 80 GB and this project; peers that are installed take part, the others are named and their
figures stay empty:  pip install vllm==0.32.0 flashinfer-python==0.7.0.post1  (FlashInfer compiles each T with nvcc
for 2 to 3 minutes, once).

Per case, a batch and a number of tokens, every contender is first checked against its reference, then captured as a
CUDA graph that walks through disjoint slots (cold L2), and all graphs are replayed in turns. Positions are drawn from
the steady state of a decode in which a drafted token is accepted with probability `steps.ACCEPT` given that the one
before it was, by each system's own rule, so each flushes as often as it would in service. `contenders.py` says what is
counted for whom. The table and what the project must show come last; the exit status is 1 if anything was wrong or
failed, whatever the speeds.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable

import torch
from arguments import new_file, numbers, seconds
from claims import Claim
from clock import Captured, copy_bandwidth, median
from contenders import CONTENDERS, Contender, FlashInfer, Plain, Speculative, checking, ours
from gate import verdict
from mamba_hybrid_kernels.verify import MOST_TOKENS
from peers import NotInstalled
from pool import compile_all
from results import Results
from rows import StepRow

BATCHES, TOKENS, SECONDS = (1, 8, 32, 64, 128, 256, 512), (1, 4, 8, 16), 100
MOST_BATCH = 512  # what the slots of a case fit the GPU at
BEST = f"{Plain.name}, best"


def compile_one(task: tuple[int, int, int]) -> str | None:
    """Compile all ways of the contender of that number for a batch and tokens, on padding rows only."""
    number, batch, tokens = task
    kind = CONTENDERS[number]
    try:
        contender = kind(batch, tokens, live=0, sets=1)
        for way in kind.ways:
            contender.call(0, way)
        torch.cuda.synchronize()
    except NotInstalled as absent:
        return f"{absent}; its figures stay empty"
    except Exception as problem:
        return f"{kind.name}, batch {batch}, T {tokens}: {verdict(problem)[1]}"
    return None


def tasks(batches: tuple[int, ...], tokens: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """What to compile, the longest first; then batch after batch, so that a batch whose launch is another one's finds
    it in the disk cache."""
    found = [(i, batch, T) for batch in batches for i, kind in enumerate(CONTENDERS) for T in tokens if kind.serves(T)]
    first = {(i, T): batch for i, batch, T in reversed(found)}
    # vLLM's update knows no T, FlashInfer's modules no batch
    found = [task for task in found if CONTENDERS[task[0]] is not Plain or task[2] == tokens[0]]
    found = [(i, b, T) for i, b, T in found if CONTENDERS[i] is not FlashInfer or b == first[i, T]]
    return sorted(found, key=lambda task: CONTENDERS[task[0]] is not FlashInfer)


def release() -> None:
    """Give back the memory of what is no longer referred to."""
    gc.collect()
    torch.cuda.empty_cache()


def checked(kind: type[Contender], batch: int, tokens: int) -> tuple[list[str], list[StepRow]]:
    """The ways that compute what they should, and a row for each that does not."""
    right, rows = [], []
    torch.manual_seed(batch * 100 + tokens)
    try:
        contender = kind(batch, tokens, **checking(batch))
    except Exception as problem:
        return [], [failed(kind, batch, tokens, "", problem)]
    for way in kind.ways:
        try:
            contender.check(way)
            right.append(way)
        except NotInstalled as absent:
            return [], [failed(kind, batch, tokens, "", absent)]
        except Exception as problem:
            rows.append(failed(kind, batch, tokens, way, problem))
    return right, rows


def failed(kind: type[Contender], batch: int, tokens: int, way: str, problem: Exception) -> StepRow:
    status, text = ("not installed", str(problem)) if isinstance(problem, NotInstalled) else verdict(problem)
    if status != "not installed":
        print(f"batch {batch}, T {tokens}, {kind.name} {way}: {status}: {text}", flush=True)
    return StepRow(batch, tokens, kind.name, way, status, problem=text)


def timed(batch: int, tokens: int, limit: float) -> list[StepRow]:
    """Check and time every contender in one case."""
    rows, contenders, captured = [], {}, {}
    kinds = [kind for kind in CONTENDERS if kind.serves(tokens)]
    for kind in kinds:
        right, wrong = checked(kind, batch, tokens)
        rows += wrong
        release()
        if not right:
            continue
        try:
            contender = contenders[kind.name] = kind(batch, tokens)
        except Exception as problem:
            rows.append(failed(kind, batch, tokens, "", problem))
            continue
        for way in right:
            calls = [lambda i=i, way=way, contender=contender: contender.call(i, way) for i in range(contender.sets)]
            try:
                captured[kind.name, way] = Captured(calls, contender.reset)
            except Exception as problem:
                rows.append(failed(kind, batch, tokens, way, problem))
    times = median(captured, seconds=limit)

    def row(name: str, way: str, contender: Contender) -> StepRow:
        micros, half = times[contender.name, way]
        return StepRow(
            batch, tokens, name, way, microseconds=micros, half_iqr=half, bytes=contender.bytes,
            flush_share=contender.flushing, sets=contender.sets,
        )  # fmt: skip

    for kind in kinds:
        ways = [way for name, way in times if name == kind.name]
        if not ways:
            continue
        best = min(ways, key=lambda way: times[kind.name, way][0])
        if kind is Plain:
            if "default" in ways:
                rows.append(row(kind.name, "default", contenders[kind.name]))
            rows.append(row(BEST, best, contenders[kind.name]))
        else:
            rows.append(row(kind.name, best, contenders[kind.name]))
    return rows


def compare(rows: list[StepRow], bandwidth: float, gpu: str) -> None:
    """Fill in what a case's rows say about each other and about the machine."""
    micros = {row.contender: row.microseconds for row in rows if row.microseconds is not None}
    for row in rows:
        row.gpu, row.copy_bandwidth = gpu, bandwidth
        if row.microseconds is None:
            continue
        row.percent_of_copy = 100 * row.bytes / (row.microseconds * 1e-6) / bandwidth
        for column, other in (
            ("to_flashinfer", FlashInfer.name),
            ("to_vllm_plain", BEST),
            ("to_vllm_plain_default", Plain.name),
            ("to_vllm_speculative", Speculative.name),
        ):
            if other in micros:
                setattr(row, column, micros[other] / row.microseconds)


def claims() -> list[Claim]:
    """What the project must show. Plain is vLLM's at its best configuration."""

    def of(heads: int, window: int, case: Callable[[StepRow], bool] = lambda row: True) -> Callable[[StepRow], bool]:
        name = ours(heads, window).name
        return lambda row: row.contender == name and case(row)

    def figure(column: str) -> Callable[[StepRow], float | None]:
        return lambda row: getattr(row, column)

    flashinfer, plain, speculative = map(figure, ("to_flashinfer", "to_vllm_plain", "to_vllm_speculative"))

    def from_64(row: StepRow) -> bool:
        return row.batch >= 64

    def single(row: StepRow) -> bool:
        return row.batch == 1

    names = {ours(heads, window).name: (heads, window) for heads in (32, 8) for window in (0, 64)}
    found = [
        Claim("window 0, 32 states: >= 1.0x FlashInfer, T <= 8", of(32, 0, lambda r: r.tokens <= 8), flashinfer, 1),
        Claim(
            "window 0, 32 states: >= 1.08x FlashInfer from batch 64, T <= 8",
            of(32, 0, lambda r: r.tokens <= 8 and from_64(r)), flashinfer, 1.08,
        ),
        Claim(
            "window 0, 32 states: >= 4x vLLM speculative from batch 32, T = 4",
            of(32, 0, lambda r: r.tokens == 4 and r.batch >= 32), speculative, 4,
        ),
        Claim(
            "window 0, 32 states: >= 6x vLLM speculative from batch 32, T = 8",
            of(32, 0, lambda r: r.tokens == 8 and r.batch >= 32), speculative, 6,
        ),
        Claim("window 0, 8 states: >= 3.0x FlashInfer from batch 64", of(8, 0, from_64), flashinfer, 3),
    ]  # fmt: skip
    for name in names:
        case = of(*names[name], from_64)
        found.append(Claim(f"{name}: >= 80 % of copy bandwidth from batch 64", case, figure("percent_of_copy"), 80))
    for name in names:
        case = of(*names[name], lambda r: single(r) and r.tokens == 4)
        found.append(Claim(f"{name}: batch 1, T = 4 no slower than vLLM plain", case, plain, 1))
    for heads, least in ((32, 0.95), (8, 2.0)):
        text = f"window 64, {heads} states: >= {least}x FlashInfer without a window, from batch 64"
        found.append(Claim(text, of(heads, 64, from_64), flashinfer, least))
    for heads, least in ((32, 1.3), (8, 3)):
        case = of(heads, 64, lambda r: r.tokens == 1 and r.batch >= 32)
        text = f"window 64, {heads} states: >= {least}x vLLM plain from batch 32, T = 1"
        found.append(Claim(text, case, plain, least))
        case = of(heads, 64, lambda r: r.tokens == 1 and single(r))
        found.append(Claim(f"window 64, {heads} states: batch 1, T = 1 no slower than vLLM plain", case, plain, 1))
    return found


def table(rows: list[StepRow]) -> list[str]:
    """One line a case: microseconds and, for ours, percent of the copy bandwidth."""
    names = [kind.name for kind in CONTENDERS if kind not in (Plain, Speculative, FlashInfer)]
    names += [Plain.name, BEST, Speculative.name, FlashInfer.name]
    by_case: dict[tuple[int, int], dict[str, StepRow]] = {}
    for row in rows:
        case = by_case.setdefault((row.tokens, row.batch), {})
        if row.contender not in case or row.status == "ok":
            case[row.contender] = row
    lines = ["  T batch " + " ".join(f"{name:>17}" for name in names) + "  microseconds (percent of copy bandwidth)"]
    for (tokens, batch), case in sorted(by_case.items()):
        cells = []
        for name in names:
            row = case.get(name)
            if row is None:
                cells.append("")
            elif row.microseconds is None:
                cells.append(row.status)
            else:
                cells.append(f"{row.microseconds:.1f} ({row.percent_of_copy:3.0f})")
        lines.append(f"{tokens:3} {batch:5} " + " ".join(f"{cell:>17}" for cell in cells).rstrip())
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=new_file, required=True, help="CSV to write")
    parser.add_argument("--batches", type=numbers(MOST_BATCH), default=BATCHES, help="1,8,... up to 512")
    parser.add_argument("--tokens", type=numbers(MOST_TOKENS), default=TOKENS, help="1,4,... up to 16")
    parser.add_argument("--limit", type=seconds, default=SECONDS, help="seconds of replays, all cases together")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs an NVIDIA GPU, torch finds none")
    gpu = torch.cuda.get_device_name()
    compile_all(compile_one, tasks(args.batches, args.tokens), "the kernels")
    bandwidth = copy_bandwidth()
    release()
    print(f"{gpu}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    results = Results(args.out, StepRow)
    cases = [(batch, T) for T in args.tokens for batch in args.batches]
    for batch, T in cases:
        rows = timed(batch, T, args.limit / len(cases))
        release()
        compare(rows, bandwidth, gpu)
        results.add(rows)
    results.finish()
    print("\n".join(table(results.rows)))
    for claim in claims():
        print(claim.judge(results.rows, lambda row: f"batch {row.batch}, T {row.tokens}"))
    bad = [row for row in results.rows if row.status in ("wrong", "error")]
    if bad:
        print(f"{len(bad)} contenders were wrong or failed, see the column problem of {args.out}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
