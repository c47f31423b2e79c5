"""`tune run distill_hybrid`, killed with SIGKILL at random moments and started again, until so many kills are done.

    python -m tests.torchtune_recipes.kill_run KILLS SEED OUT CONFIG key=value ...

Every start is a process of its own that runs torchtune's command. It is forked from this one, which has imported the
packages and done nothing else, so that a start costs a second and not ten. Whether it writes checkpoints in the
background is drawn anew each time. A run that comes to its end is compared with one that was left alone, and the next
one begins.
"""

import json
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from pathlib import Path

# what a start needs, before anything is forked
import torch
import torch.distributed.checkpoint
from safetensors.torch import load_file
from torchtune._cli import tune

import torchtune_recipes.distill_hybrid  # noqa: F401

from .fork import fork

EVERY = 3  # steps between checkpoints
MEASURED = ("step", "loss", "kl", "ce", "agreement", "tokens", "grad_norm", "lr_mixer", "lr_rest", "epoch")


def start(out: Path, words: list[str], background: bool) -> int:
    """The command in a new process, with its output in OUT.log; the process's number."""

    def work() -> None:
        log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        saving = f"checkpoint_every_n_steps={EVERY}", f"async_checkpoints={background}", "keep_last_n=2"
        sys.argv = ["tune", "run", "distill_hybrid", "--config", *words, f"output_dir={out}", *saving]
        tune.main()

    return fork(work)


def ended(child: int, within: float) -> int | None:
    """How a process ended within so many seconds, None if it has not."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    return None


def rows(out: Path) -> list[dict]:
    """Whole lines of a run's metrics."""
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [{key: row[key] for key in MEASURED} for row in map(json.loads, (li for li in lines if li.endswith("\n")))]


def newest(out: Path) -> int:
    return max((int(p.name.removeprefix("step_")) for p in out.glob("step_*")), default=0)


def main(kills: int, seed: int, home: Path, words: list[str]) -> None:
    rng = random.Random(seed)
    torch.set_num_threads(1)
    whole, began = home / "whole", time.monotonic()
    assert ended(start(whole, words, False), 300) == 0, Path(f"{whole}.log").read_text()
    length, expected, began = time.monotonic() - began, rows(whole), time.monotonic()
    where: Counter[str] = Counter()
    most, runs, done = 0, 1, 0
    while True:
        out = home / f"run_{runs}"
        background = rng.random() < 0.5
        before, logged = newest(out), len(rows(out))
        most = max(most, logged - before)
        child = start(out, words, background)
        # when as many as were asked for are done, the run comes to its end
        code = ended(child, rng.uniform(0, length) if done < kills else 300)
        if code is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            done += 1
            seen = len(rows(out))
            if seen in (logged, before):
                where["while loading"] += 1
            else:
                saving, exporting = any(out.glob(".step_*")), any(out.glob(".hybrid.*"))
                where["in a save" if saving else "in the export" if exporting else "in training"] += 1
                assert seen - newest(out) <= EVERY * (2 if background else 1)
        said = Path(f"{out}.log").read_text()
        found = re.search(r"resuming after step (\d+)", said)
        assert found is None or int(found[1]) == before, said  # the newest that has its name is what it goes on from
        if code is None:
            continue
        assert code == 0, said
        assert rows(out) == expected, out
        ours, theirs = (load_file(p / "hybrid" / "model.safetensors") for p in (out, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert [p for p in out.iterdir() if p.name.startswith(".")] == []
        if done >= kills:
            break
        runs += 1
    moments = ", ".join(f"{n} {stage}" for stage, n in where.most_common())
    print(
        f"{done} kills in {runs} runs of {len(expected)} steps ({moments}): losses and weights equal, at most {most} "
        f"steps repeated, {time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
