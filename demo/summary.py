"""The demo's closing table, from the files its commands have written.

python demo/summary.py .demo
"""

import json
import sys
from pathlib import Path


def main(work: str) -> None:
    directory = Path(work)
    distances = json.loads((directory / "compare.json").read_text())
    steps = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    before, after = distances.values()
    print()
    print(f"{'':22}{'KL nats/token':>14}{'top-1 agreement':>17}{'perplexity ratio':>18}")
    for name, d in (("converted", before), ("distilled", after)):
        print(f"{name:22}{d['kl']:14.4f}{d['agreement']:17.3f}{d['perplexity_ratio']:18.3f}")
    tokens = sum(s["tokens"] for s in steps)
    print(f"distilled on {tokens:.0f} tokens in {len(steps)} steps: KL {100 * (after['kl'] / before['kl'] - 1):+.1f} %")
    answers = {who: json.loads((directory / f"{who}.json").read_text()) for who in ("teacher", "student")}
    for question in answers["teacher"]:
        print(f"\n{question}")
        for who, replies in answers.items():
            print(f"  {who}: {replies[question].strip()}")


if __name__ == "__main__":
    main(sys.argv[1])
