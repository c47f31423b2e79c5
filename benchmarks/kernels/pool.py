"""A pool of processes that compile: each call fills the disk caches of Triton and FlashInfer, so the main process waits
for a compiler only where two calls need the same kernel at once."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable

PROCESSES = 12


def compile_all(compile_one: Callable[[tuple], str | None], tasks: list[tuple], what: str) -> None:
    """Call compile_one on every task in spawned processes and print the lines that it returns.

    What does not compile is not fatal here: its case meets the same exception again and names it in its row.
    """
    began = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(min(PROCESSES, len(tasks))) as pool:
        problems = {problem for problem in pool.imap_unordered(compile_one, tasks) if problem}
    for problem in sorted(problems):
        print(problem)
    print(f"{what} compiled in {time.perf_counter() - began:.0f} s", flush=True)
