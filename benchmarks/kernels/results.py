"""Results of a benchmark: rows of one dataclass, as a CSV that is either whole or not there."""

from __future__ import annotations

import csv
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import TypeVar

Row = TypeVar("Row")


class Results:
    """The rows of a run. They stand in OUT.part while it runs and in OUT when it is over.

    Args:
        out: the CSV.
        kind: the rows' dataclass, whose fields are the columns.
    """

    def __init__(self, out: Path, kind: type) -> None:
        self.out, self.part, self.kind = out, out.with_name(out.name + ".part"), kind
        self.rows: list = []

    def add(self, rows: list) -> None:
        """Append rows and write all of them to the temporary file."""
        self.rows += rows
        with self.part.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(self.kind)])
            writer.writeheader()
            for row in self.rows:
                writer.writerow({name: _text(value) for name, value in asdict(row).items()})

    def finish(self) -> None:
        """Give the CSV its name."""
        os.replace(self.part, self.out)


def _text(value: object) -> object:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


def read(path: Path, kind: type[Row]) -> list[Row]:
    """Rows of a CSV that Results wrote.

    Raises:
        ValueError: columns are missing.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        columns = {field.name: str(field.type) for field in fields(kind)}  # type: ignore[arg-type]
        missing = sorted(set(columns) - set(reader.fieldnames or []))
        if missing:
            raise ValueError(f"{path} lacks the columns {', '.join(missing)}")
        return [kind(**{name: _value(row[name], columns[name]) for name in columns}) for row in reader]


def _value(text: str, kind: str) -> object:
    if "None" in kind and not text:
        return None
    if kind.startswith("int"):
        return int(text)
    return float(text) if kind.startswith("float") else text
