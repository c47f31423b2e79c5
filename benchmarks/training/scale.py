"""Distillation on several GPUs: the losses of one process, and what they bring.

    python benchmarks/training/scale.py WORK [--out scale.csv] [--processes 2] [--parts equal,resume,speed,8b]
                                        [key=value ...]

Every run is `tune run [--nproc_per_node N] measured --config FILE`: `distill_hybrid` with configs/1b.yaml or 8b.yaml on
random weights of these shapes (the teacher has the student's shape) and random packed rows. Parts:

    equal   20 steps on 1 and on N processes with the same micro-batches, so that only the sums over processes differ:
            the largest relative difference of a step's loss, at most 1e-4 in fp32 (rows of 512 tokens, to be quick) and
            2e-2 in bf16. In fp32 without TF32, in deterministic order and without clipping, whose factor is another
            in its last bit: with random weights a last bit can make a gradient another one (BENCHMARKS.md)
    resume  a checkpoint of the N processes after half of the fp32 steps, resumed on 1: the same, against the N
    speed   tokens a second on 1 and on N processes with the configuration's micro-batch each (weak scaling), their
            ratio, and what each GPU held
    8b      the same for a step at the shapes of an 8B with an 8B as teacher, on N processes only, beside what
            `mamba-hybrid plan` says. Where all of it does not fit, the MLPs are frozen; the row says so

Speeds are medians of the steps after the first ten; there are none unless the losses in bf16 agree. key=value sets
keys of the timed runs (compile=True batch_size=4). A row is in the CSV as soon as it is there, and WORK keeps weights
and finished runs: the same command again goes on. A trial on a CPU, some five minutes: `scale.py WORK --tiny`.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from shapes import SHAPES, write  # noqa: E402
from step import SYNC, WARM  # noqa: E402

from torchtune_recipes.plan import Plan, plan  # noqa: E402
from torchtune_recipes.recipe import override  # noqa: E402

PARTS = ("equal", "resume", "speed", "8b")
LIMITS = {"fp32": 1e-4, "bf16": 2e-2}
KEY = ("part", "dtype", "processes", "changed")
STEPS, TIMED = 20, {"1b": WARM + 20, "8b": WARM + SYNC}
COLUMNS = (
    "part", "dtype", "processes", "rows", "length", "difference", "tokens_per_s", "ratio", "mfu", "allocated_gib",
    "planned_gib", "used_gib", "planned_used_gib", "changed", "status", "gpu",
)  # fmt: skip


@dataclass
class Run:
    """A finished run: its metrics, a row for each step, and what each process's GPU held."""

    metrics: list[dict]
    held: list[dict]

    def losses(self, after: int = 0) -> list[float]:
        """Of the steps after so many."""
        return [row["loss"] for row in self.metrics if row["step"] > after]

    def median(self, key: str) -> float | None:
        """Of a metric in the steps after the warm-up, None where it is not measured."""
        values = [row[key] for row in self.metrics if row["step"] > WARM and key in row]
        return statistics.median(values) if values else None

    def gpus(self, key: str) -> str:
        """Of each GPU, one after another."""
        return " ".join(f"{held[key]:.2f}" for held in self.held if key in held)


class Failed(Exception):
    """A run that came to no end."""


class Scale:
    """The parts, and the table that they fill.

    Args:
        args: the command line's.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work, self.out = args, Path(args.work), Path(args.out)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.rows: list[dict] = []
        if self.out.is_file():
            with self.out.open(newline="") as f:
                self.rows = list(csv.DictReader(f))

    def known(self, *key) -> dict | None:
        """The good row of a part, dtype, number of processes and what was changed, of this call or an earlier one."""
        good = (row for row in self.rows if row["status"] == "ok")
        return next((row for row in good if [str(row[k]) for k in KEY] == list(map(str, key))), None)

    def add(self, row: dict) -> dict:
        """Put a row into the CSV and on the screen."""
        self.rows = [r for r in self.rows if any(str(r[k]) != str(row[k]) for k in KEY)] + [row]
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with self.out.open("w", newline="") as f:
            writer = csv.DictWriter(f, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        print(json.dumps({key: value for key, value in row.items() if value not in ("", None)}), flush=True)
        return row

    def weights(self, shape: str) -> Path:
        """Where a shape's teacher and student are; they are made if need be, by a process that leaves the GPU again."""
        folder = self.work / shape
        if not (folder / "whole").exists():
            shutil.rmtree(folder, ignore_errors=True)
            began = time.perf_counter()
            maker = multiprocessing.get_context("spawn").Process(target=write, args=(folder, shape, self.device))
            maker.start()
            maker.join()
            if maker.exitcode:
                raise Failed(f"making the weights of {shape} failed, exit {maker.exitcode}")
            (folder / "whole").touch()
            print(f"weights of {shape}: {time.perf_counter() - began:.0f} s", flush=True)
        return folder

    def config(self, name: str, shape: str, processes: int, words: list[str], **changes) -> DictConfig:
        """The configuration of a run: the shipped one, on random weights and rows, with changes and then words."""
        cfg = OmegaConf.load(HERE.parents[1] / "configs" / f"{shape}.yaml")
        assert isinstance(cfg, DictConfig)
        if self.args.tiny:
            shape = "tiny"
            changes |= {"dataset.max_seq_len": 128, "batch_size": 1}
        folder = self.weights(shape)
        length = changes.pop("dataset.max_seq_len", cfg.dataset.max_seq_len)
        cfg.dataset = {"_component_": "shapes.random_rows", "max_seq_len": length}
        cfg.metric_loggers = [
            {"_component_": "torchtune_recipes.metrics.JSONLLogger", "path": "${output_dir}/metrics.jsonl"}
        ]
        changes = {
            "output_dir": str(self.work / name), "student": str(folder / "student"), "teacher": str(folder / "teacher"),
            "gradient_accumulation_steps": 1, "epochs": None, "lr_scheduler.num_warmup_steps": 2, "device": self.device,
            "checkpoint_every_n_steps": None, "log_every": 1,
        } | changes  # fmt: skip
        for key, value in changes.items():
            OmegaConf.update(cfg, key, value)
        cfg = override(cfg, words)
        rows = cfg.batch_size * cfg.gradient_accumulation_steps * processes * cfg.max_steps
        cfg.dataset |= {"vocabulary": SHAPES[shape]["vocab_size"], "rows": rows}
        return cfg

    def run(self, cfg: DictConfig, processes: int) -> Run:
        """Run a configuration, or read what it left in an earlier call."""
        out = Path(cfg.output_dir)
        ranks = [out / f"rank_{rank}.json" for rank in range(processes)]
        if not self.finished(cfg, processes):
            began = time.perf_counter()
            rows = f"{cfg.batch_size} x {cfg.dataset.max_seq_len} x {cfg.gradient_accumulation_steps}"
            print(f"{out.name}: {processes} x {rows} tokens, {cfg.max_steps} steps ...", flush=True)
            file = self.work / f"{out.name}.yaml"
            OmegaConf.save(cfg, file)
            command = [sys.executable, "-m", "torchtune._cli.tune", "run"]
            if processes > 1:
                command += ["--nproc_per_node", str(processes)]
            path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
            exact = {"NVIDIA_TF32_OVERRIDE": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if cfg.dtype == "fp32" else {}
            with file.with_suffix(".log").open("w") as log:
                code = subprocess.run(
                    [*command, "measured", "--config", str(file)], stdout=log, stderr=log,
                    env=os.environ | {"PYTHONPATH": path} | exact,
                ).returncode  # fmt: skip
            print(f"{out.name}: exit {code} after {time.perf_counter() - began:.0f} s", flush=True)
            if code:
                raise Failed("\n".join(file.with_suffix(".log").read_text(errors="replace").splitlines()[-25:]))
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return Run(metrics, [json.loads(file.read_text()) for file in ranks])

    def finished(self, cfg: DictConfig, processes: int) -> bool:
        """Whether an earlier call came to the end of this run."""
        out, file = Path(cfg.output_dir), self.work / f"{Path(cfg.output_dir).name}.yaml"
        ends = all((out / f"rank_{rank}.json").exists() for rank in range(processes))
        return ends and OmegaConf.load(file) == cfg

    def fresh(self, cfg: DictConfig, processes: int) -> Run:
        """As `run`, from the first step: what a cut-off run, or one of another configuration, left is forgotten."""
        if not self.finished(cfg, processes):
            shutil.rmtree(cfg.output_dir, ignore_errors=True)
        return self.run(cfg, processes)

    def equal_config(self, dtype: str, processes: int, accumulation: int, name: str) -> DictConfig:
        """Of 20 steps that learn from the same micro-batches on however many processes."""
        return self.config(
            name, "1b", processes, [], dtype=dtype, batch_size=2, gradient_accumulation_steps=accumulation,
            max_steps=STEPS,
            checkpoint_every_n_steps=STEPS // 2 if dtype == "fp32" and processes > 1 else None,
            **({"dataset.max_seq_len": 512, "clip_grad_norm": None} if dtype == "fp32" else {}),
        )  # fmt: skip

    def compared(
        self, part: str, dtype: str, cfg: DictConfig, mine: list[float], theirs: list[float], run: Run
    ) -> dict:
        """A row on losses that should be the same."""
        assert len(mine) == len(theirs) > 0
        differences = [abs(a - b) / abs(b) for a, b in zip(mine, theirs, strict=True)]
        worst = max(differences)
        at = differences.index(worst) + 1 + STEPS - len(mine)
        return self.add({
            "part": part, "dtype": dtype, "processes": self.args.processes, "rows": cfg.batch_size,
            "length": cfg.dataset.max_seq_len, "changed": "", "difference": f"{worst:.2g}",
            "gpu": run.held[0].get("gpu", "cpu"),
            "status": "ok" if worst <= LIMITS[dtype] else f"losses differ, most at step {at}",
        })  # fmt: skip

    def equal(self, dtype: str) -> dict:
        """The losses of one process and of N."""
        n = self.args.processes
        if row := self.known("equal", dtype, n, ""):
            return row
        alone = self.fresh(self.equal_config(dtype, 1, n, f"equal-{dtype}-1"), 1)
        cfg = self.equal_config(dtype, n, 1, f"equal-{dtype}-{n}")
        together = self.fresh(cfg, n)
        return self.compared("equal", dtype, cfg, together.losses(), alone.losses(), together)

    def resume(self) -> dict:
        """A checkpoint of N processes on one."""
        n, half = self.args.processes, STEPS // 2
        if row := self.known("resume", "fp32", n, ""):
            return row
        whole = self.fresh(self.equal_config("fp32", n, 1, f"equal-fp32-{n}"), n)
        cfg = self.equal_config("fp32", 1, n, f"resume-fp32-{n}-1")
        out = Path(cfg.output_dir)
        if not self.finished(cfg, 1):
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(self.work / f"equal-fp32-{n}" / f"step_{half}", out / f"step_{half}", copy_function=os.link)
        resumed = self.run(cfg, 1)
        return self.compared("resume", "fp32", cfg, resumed.losses(half), whole.losses(half), resumed)

    def timed(self, part: str, shape: str, processes: int, changes: list[str]) -> dict:
        """A row on speed and memory of a run with these changes, which is not yet in the table."""
        cfg = self.config(f"{part}-{processes}", shape, processes, changes, max_steps=TIMED[shape], log_every=SYNC)
        run, planned = self.fresh(cfg, processes), self.plan(cfg, processes)
        speed, mfu = run.median("tokens_per_s"), run.median("mfu")
        assert speed is not None
        return {
            "part": part, "dtype": cfg.dtype, "processes": processes, "rows": cfg.batch_size,
            "length": cfg.dataset.max_seq_len, "tokens_per_s": round(speed),
            "mfu": "" if mfu is None else round(mfu, 3),
            "allocated_gib": run.gpus("allocated"), "planned_gib": round(planned.peak.total / 2**30, 2),
            "used_gib": run.gpus("used"), "planned_used_gib": round(planned.total / 2**30, 2),
            "changed": " ".join(changes), "status": "ok", "gpu": run.held[0].get("gpu", "cpu"),
        }  # fmt: skip

    def plan(self, cfg: DictConfig, processes: int) -> Plan:
        """What `mamba-hybrid plan` says of a run."""
        file = self.work / "plan.yaml"
        OmegaConf.save(cfg, file)
        return plan(file, ["device=cuda"], recipe="distill_hybrid", gpus=processes, gpu_gb=self.args.gpu_mem)

    def may_time(self, part: str, changes: list[str]) -> bool:
        """Whether the losses in bf16 agree; where they do not there is a row that says so and no speed."""
        if self.equal("bf16")["status"] == "ok":
            return True
        self.add({
            "part": part, "dtype": "bf16", "processes": self.args.processes, "changed": " ".join(changes),
            "status": "no speed: losses differ",
        })  # fmt: skip
        return False

    def speed(self) -> None:
        """Weak scaling."""
        n, changes = self.args.processes, self.args.changes
        text = " ".join(changes)
        if self.known("speed", "bf16", n, text) or not self.may_time("speed", changes):
            return
        one = self.known("speed", "bf16", 1, text) or self.add(self.timed("speed", "1b", 1, changes))
        row = self.timed("speed", "1b", n, changes)
        self.add(row | {"ratio": round(row["tokens_per_s"] / int(one["tokens_per_s"]), 3)})

    def large(self) -> None:
        """A step at the shapes of an 8B."""
        n, changes = self.args.processes, self.args.changes
        frozen = [*changes, "freeze=[mlp]"]
        if any(self.known("8b", "bf16", n, " ".join(words)) for words in (changes, frozen)):
            return
        if not self.may_time("8b", changes):
            return
        planned = self.plan(self.config("8b", "8b", n, changes, max_steps=1), n)
        fits = planned.total <= planned.gpu
        if not fits:
            print(f"8b: {planned.total / 1e9:.1f} GB of {planned.gpu / 1e9:.0f} planned; MLPs are frozen", flush=True)
        self.add(self.timed("8b", "8b", n, changes if fits else frozen))


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("work", help="directory for weights (24 GB with 8b), runs (20 GB) and logs")
    p.add_argument("changes", nargs="*", metavar="key=value", help="of the timed runs' configurations, or ~key")
    p.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    p.add_argument("--processes", type=int, default=2)
    p.add_argument("--out", default="scale.csv", help="CSV to write, or to go on with")
    p.add_argument("--gpu-mem", type=float, default=80, help="memory of a GPU in 10^9 bytes (80)")
    p.add_argument("--tiny", action="store_true", help="tiny shapes: a trial")
    args = p.parse_intermixed_args()
    if odd := sorted(set(args.parts) - set(PARTS)):
        p.error(f"unknown parts {odd}; there are {', '.join(PARTS)}")
    if args.processes < 2 or any("=" not in word and word[0] != "~" for word in args.changes):
        p.error("--processes must be 2 or more, and what is changed key=value or ~key")
    scale = Scale(args)
    scale.work.mkdir(parents=True, exist_ok=True)
    steps = {
        "equal": lambda: [scale.equal(dtype) for dtype in LIMITS],
        "resume": scale.resume,
        "speed": scale.speed,
        "8b": scale.large,
    }
    failed = False
    for part in args.parts:
        try:
            steps[part]()
        except Failed as e:
            print(f"{part} failed: {e}", file=sys.stderr, flush=True)
            failed = True
    return int(failed or any(row["status"] != "ok" for row in scale.rows))


if __name__ == "__main__":
    sys.exit(main())
