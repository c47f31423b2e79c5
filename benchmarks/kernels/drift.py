"""How far a bf16 state drifts from an fp32 one over a long decode.

    python benchmarks/kernels/drift.py --out drift.csv

The same random tokens go through slots with an fp32 state, a bf16 state rounded to the nearest on a flush and one
rounded at random, 4,096 steps of one token; half-lives of the states are spread from 4 to 4,096 tokens. Reported is
the error of the far output against the fp32 state's, as a share of its norm, over windows of 512 steps.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from arguments import new_file
from mamba_hybrid_kernels import SlotTensors
from mamba_hybrid_kernels.verify import verify
from results import Results
from steps import DEVICE, Step

STEPS, EVERY, ROWS = 4096, 512, 8


@dataclass
class DriftRow:
    """Error of the far outputs of `rounding` over the steps up to `step`, as a share of their norm."""

    step: int
    rounding: str
    error: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=new_file, required=True, help="CSV to write")
    out: Path = parser.parse_args().out
    torch.manual_seed(0)
    step = Step(ROWS, 1, 8, 64, count=1)
    G, H, W = step.groups, step.heads, step.width
    layouts = {"fp32": step.layout, "nearest": replace(step.layout, state_dtype=torch.bfloat16)}
    layouts["random"] = layouts["nearest"]
    slots = {name: SlotTensors.allocate(layout, ROWS, DEVICE) for name, layout in layouts.items()}
    half_life = torch.logspace(2, 12, 8, base=2, device=DEVICE)
    A, D = -torch.log(torch.tensor(2.0, device=DEVICE)) / half_life, torch.zeros(H, device=DEVICE)
    slot, first = (torch.arange(n, dtype=torch.int32, device=DEVICE) for n in (ROWS, ROWS + 1))
    dt = torch.ones(ROWS, 8, device=DEVICE)
    error = dict.fromkeys(layouts, torch.zeros((), device=DEVICE))
    results = Results(out, DriftRow)
    for t in range(STEPS):
        x, B = (torch.randn(ROWS, G, W, device=DEVICE).bfloat16() for _ in range(2))
        C = torch.randn(ROWS, H, W, device=DEVICE).bfloat16()
        start = torch.full((ROWS,), t, dtype=torch.int32, device=DEVICE)
        far = {}
        for name, layout in layouts.items():
            far[name] = torch.empty(ROWS, H, W, device=DEVICE)
            verify(
                slots[name], layout, slot, start, first, x, dt, A, B, C, D, max_tokens=1,
                near_MHP=torch.empty_like(far[name]), far_MHP=far[name], seed=t if name == "random" else None,
            )  # fmt: skip
        for name in layouts:
            target = far["fp32"] if name == "fp32" else far[name] - far["fp32"]
            error[name] = error[name] + target.square().sum()
        if (t + 1) % EVERY == 0:
            rows = [DriftRow(t + 1, n, float((error[n] / error["fp32"]).sqrt())) for n in ("nearest", "random")]
            results.add(rows)
            print(" ".join(f"step {row.step} {row.rounding} {row.error:.2e}" for row in rows), flush=True)
            error = dict.fromkeys(layouts, torch.zeros((), device=DEVICE))
    results.finish()


if __name__ == "__main__":
    main()
