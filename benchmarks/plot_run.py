"""Draw the KL of a distillation run over its tokens: python benchmarks/plot_run.py METRICS.jsonl OUT.png"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SMOOTH = 10  # steps of the running mean


def main(metrics: str, out: str) -> None:
    rows = [json.loads(line) for line in Path(metrics).read_text().splitlines()]
    tokens, kl, total = [], [], 0
    for row in rows:
        total += row["tokens"]
        tokens.append(total / 1e6)
        kl.append(row["kl"])
    mean = [sum(kl[max(0, i - SMOOTH + 1) : i + 1]) / len(kl[max(0, i - SMOOTH + 1) : i + 1]) for i in range(len(kl))]
    figure, axes = plt.subplots(figsize=(7, 3.5))
    axes.plot(tokens, kl, color="0.8", linewidth=0.8, label="a step")
    axes.plot(tokens, mean, color="C0", label=f"mean of {SMOOTH} steps")
    axes.set(xlabel="tokens trained on, millions", ylabel="KL(teacher || student), nats per token", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
