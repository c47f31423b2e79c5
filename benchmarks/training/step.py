"""Training steps at the shapes of a 1B: the recipes against the loop that one writes first.

    python benchmarks/training/step.py [--systems plain,distill,align] [--shape 1b] [--batch 4] [--length 2048]
                                       [--steps 40] [--out step.csv]

Systems, each in a process of its own on one GPU:

    plain          transformers' Llama as the teacher, the hybrid through autocast, both models' whole logits,
                   torchtune's ForwardKLLoss, AdamW in fp32; our kernels off: the SSD and the window in plain PyTorch,
                   attention with the documents as a mask
    plain+kernels  the same with our kernels
    distill        `tune run distill_hybrid` with compiled layers and a compiled AdamW
    distill-fp8    the same, the layers' projections multiplied in fp8
    distill-eager  as distill, not compiled
    distill-kept   not compiled, keeping only layer inputs for the backward pass (activation checkpointing)
    align          `tune run align_hybrid` with compiled layers and a compiled AdamW

All train every parameter but `align`, on the same random packed rows, with AdamW in fp32 (PyTorch's fused one where it
is not compiled). Tokens a second are the median of the steps after the first ten. MFU counts what the formulas need
(`mamba_hybrid/flops.py`), not what is computed twice. A speed is printed only if the KL of the first step is that of
the first system. (ForwardKLLoss leaves the teacher's entropy out; the plain loop's KL is worked out beside it, before
the clock runs.)

`--profile` prints, of the recipes, where the GPU's time of two more steps goes, by kernel, and how long it waited.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from omegaconf import OmegaConf

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
WARM = 10
ACTIVE, SHOWN = 2, 60  # steps and kernels of a profile
AGREE, SYNC = 0.05, 10  # relative, of the first KL, in bf16; steps between two looks at the metrics
COLUMNS = ("system", "tokens_per_s", "mfu", "peak_memory_gib", "first_loss", "gpu")


def settings(folder: Path, args: argparse.Namespace, system: str) -> dict:
    """The recipe's configuration; the plain loop takes its numbers from it too."""
    from shapes import SHAPES

    compiled = args.device == "cuda" and system in ("distill", "distill-fp8", "align")
    config = {
        "output_dir": str(folder / system),
        "student": str(folder / "student"),
        "teacher": str(folder / "teacher"),
        "dataset": {
            "_component_": "shapes.random_rows", "max_seq_len": args.length, "rows": args.batch * args.steps,
            "vocabulary": SHAPES[args.shape]["vocab_size"],
        },
        "optimizer": {"weight_decay": 0.0} | (
            {"_component_": "torchtune_recipes.adamw.CompiledAdamW"} if compiled
            else {"_component_": "torch.optim.AdamW", "fused": True}
        ),
        "mixer_lr": 1e-4,
        "batch_size": args.batch,
        "max_steps": args.steps,
        "device": args.device,
        "dtype": "bf16" if args.device == "cuda" else "fp32",
        "compile": compiled,
        "clip_grad_norm": 1.0,
        "log_every": SYNC,
        "metric_loggers": [
            {"_component_": "torchtune_recipes.metrics.JSONLLogger", "path": "${output_dir}/metrics.jsonl"}
        ],
    }  # fmt: skip
    if system != "align":
        config |= {"rest_lr": 1e-4, "loss": {"chunk_tokens": args.chunk}}
    if system == "distill-fp8":
        config["fp8"] = True
    if system == "distill-kept":
        config["enable_activation_checkpointing"] = True
    return config


def recipe(folder: Path, args: argparse.Namespace, system: str) -> dict:
    """A run of the real recipe, without what comes after its last step."""
    from torchtune_recipes.align_hybrid import AlignHybrid
    from torchtune_recipes.distill_hybrid import DistillHybrid

    cfg = OmegaConf.create(settings(folder, args, system))
    run = (AlignHybrid if system == "align" else DistillHybrid)(cfg)
    run.save_checkpoint = run.export = lambda **_: None
    run.setup()
    if args.profile:
        profiled(run, system, args.steps)
    run.train()
    run.cleanup()
    rows = [json.loads(line) for line in (folder / system / "metrics.jsonl").read_text().splitlines()]
    return result(args, system, [row["tokens_per_s"] for row in rows], rows[0]["loss"])


def profiled(run, system: str, steps: int) -> None:
    """Let a recipe's last steps be watched, and print their kernels when they are done."""
    from torch.profiler import profile, schedule

    def show(p: profile) -> None:
        on_gpu = [e for e in p.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        kernels = [e for e in on_gpu if not e.is_user_annotation]
        if not kernels:
            print("nothing ran on a GPU", file=sys.stderr)
            return
        spans = sorted((e.time_range.start, e.time_range.end) for e in kernels)
        busy, until = 0.0, spans[0][0]
        for start, end in spans:
            busy += max(0.0, end - max(start, until))
            until = max(until, end)
        whole, times, counts = until - spans[0][0], defaultdict(float), defaultdict(int)
        for e in kernels:
            times[e.name] += e.time_range.elapsed_us()
            counts[e.name] += 1
        print(f"{system}: {whole / ACTIVE / 1e3:.1f} ms a step, {1 - busy / whole:.1%} of them idle", file=sys.stderr)
        for name in sorted(times, key=times.__getitem__, reverse=True)[:SHOWN]:
            per_step = times[name] / ACTIVE / 1e3
            print(f"{per_step:8.2f} ms {counts[name] // ACTIVE:5} x  {name[:150]}", file=sys.stderr)

    watching = schedule(wait=steps - ACTIVE - 2, warmup=1, active=ACTIVE)
    watch = profile(schedule=watching, on_trace_ready=show)
    watch.start()
    run.after_step = watch.step


def plain(folder: Path, args: argparse.Namespace, system: str) -> dict:
    """The loop that one writes first."""
    import functools

    from torchtune.modules.loss import ForwardKLLoss
    from transformers import AutoTokenizer, LlamaForCausalLM

    import mamba_hybrid.mixer
    import mamba_hybrid.model
    from mamba_hybrid.checkpoint import load_model
    from torchtune_recipes.order import RowOrder
    from torchtune_recipes.packing import Batch
    from torchtune_recipes.recipe import component

    if system == "plain":
        mamba_hybrid.mixer.ssd = functools.partial(mamba_hybrid.mixer.ssd, backend="reference")
        mamba_hybrid.model.packed_runs = lambda *_: False
    cfg = OmegaConf.create(settings(folder, args, system))
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")
    teacher = LlamaForCausalLM.from_pretrained(cfg.teacher, dtype=torch.bfloat16).to(device).eval()
    student = load_model(cfg.student, torch.float32).to(device).train()
    data = component("dataset", cfg.dataset, AutoTokenizer.from_pretrained(cfg.teacher))
    order = RowOrder(len(data), args.batch, 1, 0)
    optimizer = component("optimizer", cfg.optimizer, student.parameters(), lr=cfg.mixer_lr)
    loss_of, speeds, first = ForwardKLLoss(), [], math.nan
    began = time.perf_counter()
    for step in range(args.steps):
        batch = Batch(*(t.to(device) for t in data.batch(next(order.micro_batches(step)))))
        # transformers finds the documents by their positions, which start anew in each
        starts = torch.nn.functional.pad(batch.documents.diff(dim=1) != 0, (1, 0), value=True)
        columns = torch.arange(args.length, device=device).expand_as(batch.tokens)
        positions = columns - torch.where(starts, columns, 0).cummax(1).values
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            with torch.no_grad():
                target = teacher(batch.tokens, position_ids=positions, use_cache=False).logits
            logits = student(batch.tokens, document_ids=batch.documents).logits
        if step == 0:
            first = kl(target, logits, batch.labels)
        loss_of(logits, target, batch.labels).backward()
        del logits, target
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % SYNC == 0:
            float(norm)  # waits for the device
            now = time.perf_counter()
            speeds += [SYNC * args.batch * args.length / (now - began)] * SYNC
            began = now
    return result(args, system, speeds, first)


@torch.no_grad()
def kl(target_BLV: torch.Tensor, logits_BLV: torch.Tensor, labels_BL: torch.Tensor) -> float:
    """Mean KL(teacher || student) of the labelled tokens, row by row in fp32."""
    total = 0.0
    for target, logits, labels in zip(target_BLV, logits_BLV, labels_BL, strict=True):
        for span in torch.nonzero(labels != -100)[:, 0].split(512):
            log_p, log_q = (t[span].float().log_softmax(-1) for t in (target, logits))
            total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / int((labels_BL != -100).sum())


def result(args: argparse.Namespace, system: str, speeds: list[float], first_loss: float) -> dict:
    """A row of the table."""
    from shapes import SHAPES

    from mamba_hybrid.config import HybridMambaConfig
    from mamba_hybrid.flops import alignment_flops, distillation_flops, peak_flops

    layers = SHAPES[args.shape]["num_hidden_layers"]
    kinds = {"linear": ["linear_attention", "full_attention"] * (layers // 2), "full": ["full_attention"] * layers}
    student, teacher = (HybridMambaConfig(**SHAPES[args.shape], layer_types=kinds[k]) for k in ("linear", "full"))
    flops = (alignment_flops if system == "align" else distillation_flops)(student, teacher, args.length)
    speed = statistics.median(speeds[WARM:])
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    peak = peak_flops(gpu, torch.bfloat16)
    memory = torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else math.nan
    return {
        "system": system, "tokens_per_s": round(speed), "mfu": round(speed * flops / peak, 3) if peak else "",
        "peak_memory_gib": round(memory, 2), "first_loss": round(first_loss, 4), "gpu": gpu,
    }  # fmt: skip


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--systems", default="plain,distill,align")
    p.add_argument("--shape", choices=("1b", "tiny"), default="1b")
    p.add_argument("--batch", type=int, default=4, help="rows of a step (4)")
    p.add_argument("--length", type=int, default=2048, help="tokens of a row (2048)")
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--chunk", type=int, default=2048, help="tokens whose logits exist at a time (2048)")
    p.add_argument("--profile", action="store_true", help="print the kernels of the recipes' last steps")
    p.add_argument("--out", metavar="FILE.csv")
    p.add_argument("--measure", nargs=2, metavar=("SYSTEM", "FOLDER"), help=argparse.SUPPRESS)
    args = p.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.steps <= WARM or args.steps % SYNC:
        p.error(f"--steps {args.steps} must be a multiple of {SYNC} above the {WARM} steps that warm up")
    if args.measure:
        system, folder = args.measure
        row = (plain if system.startswith("plain") else recipe)(Path(folder), args, system)
        print(json.dumps(row), flush=True)
        return 0
    from shapes import write

    rows, failed = [], False
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), args.shape, args.device)
        for system in args.systems.split(","):
            done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--measure", system, folder],
                                  stdout=subprocess.PIPE, text=True)  # fmt: skip
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            if done.returncode or not lines:
                print(f"{system} failed, exit {done.returncode}", file=sys.stderr)
                failed = True
                continue
            rows.append(json.loads(lines[-1]))
            if not agrees(rows):
                print(f"{system} begins at a loss of {rows[-1]['first_loss']}: no speed", file=sys.stderr)
                rows.pop()
                failed = True
                continue
            print(json.dumps(rows[-1]), flush=True)
    if args.out:
        with open(args.out, "w", newline="") as f:
            writer = csv.DictWriter(f, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    return int(failed)


def agrees(rows: list[dict]) -> bool:
    """Whether the newest row's loss is that of the others which learn the same."""
    if rows[-1]["system"] == "align":
        return math.isfinite(rows[-1]["first_loss"])
    losses = [row["first_loss"] for row in rows if row["system"] != "align"]
    return abs(losses[-1] - losses[0]) <= AGREE * losses[0]


if __name__ == "__main__":
    sys.exit(main())
