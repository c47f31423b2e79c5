"""Free English text for distillation runs, from Debian and PyPI packages; about 92 MB, 23 million tokens.

    apt-get download python3.11-doc linux-doc-6.1 dict-gcide wordnet-base debian-handbook debian-reference-en
    mkdir packages; for d in *.deb; do dpkg -x $d packages/${d%%_*}; done
    pip download --no-deps chitchat-dataset==0.9.0 && unzip chitchat_dataset-*.whl -d packages/chitchat
    python benchmarks/corpus.py packages .demo/train.jsonl text.jsonl

Licences: PSF (Python), GPL-2 (Linux, GCIDE, Debian's books), WordNet's, MIT (chitchat), CC BY-SA 3.0 (Wikipedia, the
passages that `demo/wikipedia.py` does not set aside for scoring).
"""

import gzip
import html
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path


def lines_of(path: Path) -> Iterator[str]:
    with (gzip.open if path.suffix in (".gz", ".dz") else open)(path, "rt", errors="ignore") as f:
        yield from f


def joined(entries: list[str], n: int, rng: random.Random) -> Iterator[str]:
    """Short entries, shuffled, n to a document."""
    rng.shuffle(entries)
    for i in range(0, len(entries), n):
        yield "\n".join(entries[i : i + n])


def python_docs(root: Path) -> Iterator[str]:
    for path in sorted(root.glob("python3.11-doc/**/*.rst.txt")):
        yield "".join(lines_of(path))


def linux_docs(root: Path) -> Iterator[str]:
    for path in sorted(root.glob("linux-doc-6.1/usr/share/doc/**/Documentation/**/*")):
        if path.is_file() and "translations" not in path.parts and re.search(r"\.(rst|txt)(\.gz)?$", path.name):
            yield "".join(lines_of(path))


def wordnet(root: Path, rng: random.Random) -> Iterator[str]:
    glosses = []
    for path in sorted(root.glob("wordnet-base/**/data.*")):
        for line in lines_of(path):
            if "|" in line and not line.startswith("  "):
                word = line.split()[4].replace("_", " ")
                glosses.append(f"{word}: {line.split('|', 1)[1].strip()}")
    yield from joined(glosses, 60, rng)


def gcide(root: Path, rng: random.Random) -> Iterator[str]:
    text = "".join(lines_of(next(root.glob("dict-gcide/**/*.dict.dz"))))
    entries = []
    for entry in re.split(r"\n(?=\S)", text):
        entry = re.sub(r"\s+", " ", re.sub(r"\[.{0,30}?\]|[{}]", "", entry)).strip()
        if len(entry) > 80 and sum(ord(c) < 128 for c in entry) > 0.98 * len(entry):
            entries.append(entry)
    yield from joined(entries, 25, rng)


def debian_books(root: Path) -> Iterator[str]:
    for path in [*root.glob("debian-handbook/**/en-US/**/*.html"), *root.glob("debian-reference-en/**/*.html")]:
        text = re.sub(r"(?s)<(script|style).*?</\1>", "", "".join(lines_of(path)))
        yield re.sub(r"\n\s*\n+", "\n\n", html.unescape(re.sub(r"<[^>]+>", "", text)))


def chitchat(root: Path) -> Iterator[str]:
    dialogues = json.loads(next(root.glob("chitchat/**/dataset.json")).read_text())
    for dialogue in dialogues.values():
        yield "\n".join(message["text"] for turn in dialogue["messages"] for message in turn)


def passages(path: Path) -> Iterator[str]:
    for line in path.read_text().splitlines():
        yield json.loads(line)["text"]


def main(packages: str, wikipedia: str, out: str) -> None:
    root, rng = Path(packages), random.Random(0)
    parts = {
        "python": python_docs(root),
        "linux": linux_docs(root),
        "wordnet": wordnet(root, rng),
        "gcide": gcide(root, rng),
        "debian": debian_books(root),
        "chitchat": chitchat(root),
        "wikipedia": passages(Path(wikipedia)),
    }
    documents: list[str] = []
    for name, texts in parts.items():
        kept = [t for t in dict.fromkeys(texts) if len(t) > 200]
        print(f"{name:10} {len(kept):6} documents {sum(map(len, kept)) / 1e6:6.1f} MB")
        documents += kept
    rng.shuffle(documents)
    Path(out).write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))


if __name__ == "__main__":
    main(*sys.argv[1:])
