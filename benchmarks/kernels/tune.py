"""Make the launch table of this GPU: `python benchmarks/kernels/tune.py [--out TABLE.json]`, a minute on an H100.

For each case of the verify benchmark every candidate is first checked against the reference, then timed on a few batch
sizes; the table keeps the fastest for each. Without --out it is written where the kernels look for it.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path

import torch
from clock import Captured, median
from contenders import CHECKED, RINGS, Ours, checking
from gate import Wrong
from mamba_hybrid_kernels.launch import table_path
from mamba_hybrid_kernels.verify import VerifyLaunch, launch_case, verify
from pool import compile_all
from triton.runtime.errors import OutOfResources

BATCHES = (1, 8, 32, 64, 256)
CASES = [(S, w, T) for S in (32, 8) for w in (0, 64) for T in (1, 4, 8, 16)]
SMALL = [
    VerifyLaunch(block_p=32, block_c=128, stages=1, eager=True),
    VerifyLaunch(block_p=16, block_c=128, stages=1, eager=True),
    VerifyLaunch(block_p=64, block_c=128, stages=1, eager=True),
    VerifyLaunch(block_p=32, block_c=64),
]
MEDIUM = [
    VerifyLaunch(block_p=32, block_c=128, stages=1, registers=128),
    VerifyLaunch(block_p=32, block_c=128, stages=1, registers=128, eager=True),
]
LARGE = [
    VerifyLaunch(block_p=64, block_c=128, stages=1, registers=168),
    VerifyLaunch(block_p=64, block_c=64, registers=128),
    VerifyLaunch(block_p=64, block_c=64),
    VerifyLaunch(block_p=128, block_c=32, stages=3),
    VerifyLaunch(block_p=128, block_c=32, registers=128),
    VerifyLaunch(block_p=128, block_c=64, registers=168),
]


def candidates(states: int) -> list[VerifyLaunch]:
    """Launches worth a try for a batch of so many states."""
    if states <= 64:
        return SMALL
    return SMALL[:1] + MEDIUM + LARGE if states <= 1024 else MEDIUM[:1] + LARGE


class Tuned(Ours):
    """The verify kernel with a given launch; `ways` maps a launch's text to it."""

    ways = {repr(launch): launch for launch in SMALL + MEDIUM + LARGE}

    def call(self, i: int, way: str) -> None:
        verify(
            self.slots, self.step.layout, self.slot[i], self.start, self.first, *self.inputs,
            max_tokens=self.step.tokens, near_MHP=self.near, far_MHP=self.far, launch=self.ways[way],
        )  # fmt: skip


def of(S: int, w: int) -> type[Tuned]:
    """The contender with so many state heads and that window."""
    return type("Case", (Tuned,), {"name": f"S={S} w={w}", "state_heads": S, "window": w})


@functools.cache
def check(task: tuple) -> str | None:
    """Compile one candidate and compare it with the reference; a line if it does not serve."""
    S, w, T, way = task
    try:
        of(S, w)(CHECKED, T, **checking(CHECKED)).check(way)
        torch.cuda.synchronize()
    except OutOfResources as problem:
        return f"{task} needs more than the GPU has: {problem}"
    except Wrong as problem:
        return f"{task} is WRONG: {problem}"
    return None


def text_of(table: dict[str, list[list]]) -> str:
    """The table as JSON, a launch a line."""
    cases = [
        f" {json.dumps(case)}: [\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n ]"
        for case, rows in table.items()
    ]
    return "{\n" + ",\n".join(cases) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=table_path(torch.cuda.get_device_name()))
    args = parser.parse_args()
    began = time.perf_counter()
    compile_all(check, [(S, w, T, way) for S, w, T in CASES for way in Tuned.ways], "candidates")
    table: dict[str, list[list]] = {}
    for S, w, T in CASES:
        rows: list[list] = []
        for batch in BATCHES:
            case = of(S, w)(batch, T)
            captured = {}
            for launch in candidates(batch * S):
                way = repr(launch)
                if check((S, w, T, way)) is None:
                    calls = [lambda i=i, way=way, case=case: case.call(i, way) for i in range(case.sets)]
                    captured[way] = Captured(calls, case.reset)
            times = median(captured, 7)
            best = min(times, key=lambda way: times[way][0])
            chosen = {k: v for k, v in vars(case.ways[best]).items() if v != getattr(VerifyLaunch(), k)}
            print(f"S {S} window {w} T {T} batch {batch}: {times[best][0]:.1f} us {chosen}", flush=True)
            if rows and rows[-1][1] == chosen:
                rows.pop()
            rows.append([batch * S, chosen])
            del case, captured
            torch.cuda.empty_cache()
        rows[-1][0] = None
        table[launch_case(of(S, w)(1, T).step.layout, T)] = rows
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text_of(table))
    print(f"{args.out}: {len(table)} cases (rings {RINGS}) in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
