"""A training set of a model's answers (sequence-level distillation), with a record of how they were made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mamba_hybrid.errors import UserError
from mamba_hybrid.output import check_output, to_disk


def record_of(path: str | Path) -> Path:
    """The file that says what made a training set."""
    return Path(f"{path}.json")


class TrainingSet:
    """FILE, a conversation a line under "messages", and FILE.json, which says what made them.

    Args:
        path: of the file; written whole or not at all.
        settings: what the answers were made with.
        overwrite: replace a file that was made with other settings.

    Raises:
        UserError: it was made with other settings, is none, or cannot be written.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any], *, overwrite: bool = False) -> None:
        self.path, self.settings = Path(path), settings
        self.record = record_of(path)
        check_output("--training-set", path)
        if self.path.exists() and not overwrite:
            self._check()

    def _check(self) -> None:
        way_out = "give another --training-set, or --overwrite to replace it"
        try:
            made = dict(json.loads(self.record.read_text())["settings"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"--training-set {self.path} has no record {self.record} of its making; {way_out}") from e
        for name, now in self.settings.items():
            if made.get(name) != now:
                raise UserError(f"{self.path} was made with {name} {made.get(name)!r}, not {now!r}; {way_out}")

    def write(self, answers: str | Path, ids: Iterable[str | int]) -> tuple[int, int]:
        """Write both files.

        An answer that ended at the longest length is left out: the template would end it in the middle, and the
        student would learn to.

        Args:
            answers: the file that `Results` wrote.
            ids: of the rows to take, in the order that the conversations are to have.

        Returns:
            How many conversations were written, and how many answers were left out.

        Raises:
            UserError: no answer is whole, or the files cannot be written.
        """
        whole = cut = 0
        work = self.path.with_name(f".{self.path.name}.tmp")
        try:
            with work.open("w", encoding="utf-8") as out:
                for row in _rows(Path(answers), ids):
                    for answer in row["outputs"]:
                        if answer["finish_reason"] != "stop":
                            cut += 1
                            continue
                        said = {"role": "assistant", "content": answer["text"]}
                        line = {"id": row["id"], "messages": [*row["input"]["messages"], said]}
                        out.write(json.dumps(line, ensure_ascii=False) + "\n")
                        whole += 1
            to_disk(work)
            record = {"settings": self.settings, "answers": str(answers), "conversations": whole, "cut_off": cut}
            if whole:
                self.record.write_text(json.dumps(record, indent=2) + "\n")
                work.replace(self.path)
        except OSError as e:
            raise UserError(f"--training-set {self.path} cannot be written: {e.strerror}") from e
        finally:
            work.unlink(missing_ok=True)
        if not whole:
            raise UserError(f"all {cut} answers were cut off: no --training-set; raise --max-tokens")
        return whole, cut


def _rows(answers: Path, ids: Iterable[str | int]) -> Iterator[dict[str, Any]]:
    """Rows of these ids, which stand in the file in the order in which they were answered."""
    starts, at = {}, 0
    with answers.open("rb") as lines:
        for line in lines:
            starts[json.loads(line)["id"]] = at
            at += len(line)
        for id in ids:
            if id in starts:
                lines.seek(starts[id])
                yield json.loads(lines.readline())
