"""Plain text for the demo and the benchmarks: the Wikipedia passages of the PyPI package `evals` (CC BY-SA 3.0).

    python demo/wikipedia.py evals-3.0.1.post1-py3-none-any.whl OUT

writes OUT/eval.jsonl (the first 200 passages, to score on) and OUT/train.jsonl (the other 800).
"""

import json
import sys
import zipfile
from pathlib import Path

MEMBER = "evals/registry/data/schelling_point/wikipedia_5.jsonl"
SCORED = 200


def main(wheel: str, out: str) -> None:
    with zipfile.ZipFile(wheel) as z:
        lines = z.read(MEMBER).decode().splitlines()
    # key "0" is the passage itself, the others are its sentences shuffled
    passages = [json.dumps({"text": json.loads(line)["0"].strip() + "\n"}) + "\n" for line in lines]
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "eval.jsonl").write_text("".join(passages[:SCORED]))
    (directory / "train.jsonl").write_text("".join(passages[SCORED:]))


if __name__ == "__main__":
    main(*sys.argv[1:])
