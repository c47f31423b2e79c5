"""Rows of a data set: local JSONL, Parquet or text files, or a data set of the Hugging Face hub."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mamba_hybrid.errors import UserError, first_line
from mamba_hybrid.text import jsonl_rows, read_file

LOCAL = (".jsonl", ".json", ".parquet", ".txt")

Row = tuple[str, Any]  # where it stands, for error messages; the value of its column
Column = str | Mapping[str, str]  # one, or several as key of the configuration -> column


def read_rows(source: str | list[str], column: Column, split: str = "train") -> Iterator[Row]:
    """Values of one column or of several, row after row: see `RowReader`."""
    yield from RowReader(source, column, split)


class RowReader:
    """Values of one column or of several, row after row, of which a reader can go on where another one stopped.

    Args:
        source: a .jsonl (or .json with a row a line), .parquet or .txt file (one row, its text), a glob pattern
            of such files, a list of these, or the name of a data set on the hub.
        column: whose values are wanted; a .txt file has the column "text". Of several, as {key of the configuration:
            column}, the value is a dict with these keys.
        split: of a data set on the hub.
        streaming: do not download a data set of the hub first; files are read as they are needed anyway.

    Raises:
        UserError: no such file or data set; while reading, a file that cannot be read or a row without the column.
    """

    def __init__(
        self, source: str | list[str], column: Column, split: str = "train", *, streaming: bool = False
    ) -> None:
        self.source, self.column, self.split, self.streaming = source, column, split, streaming
        self._place: dict[str, Any] = {"file": 0, "rows": 0}
        self._hub: Any = None
        self.files: list[Path] = []
        if isinstance(source, str) and Path(source).suffix not in LOCAL:
            if Path(source).exists():
                raise UserError(f"dataset.source {source} is none of {', '.join(LOCAL)}")
            self._hub = self._load()
            return
        for name in [source] if isinstance(source, str) else source:
            files = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
            if not files:
                raise UserError(f"dataset.source {name} matches no file")
            for file in files:
                if not Path(file).is_file():
                    raise UserError(f"dataset.source {file} does not exist")
            self.files += map(Path, files)

    def place(self) -> dict[str, Any]:
        """Behind the last row that was given, as JSON can hold it."""
        streamed = self._hub is not None and self.streaming
        return self._place | ({"stream": self._hub.state_dict()} if streamed else {})

    def begin(self, place: dict[str, Any] | None = None) -> Iterator[Row]:
        """(where it stands, its value) of the rows from a place on, None for the first."""
        self._place = dict(place or {"file": 0, "rows": 0})
        stream = self._place.pop("stream", None)
        if self._hub is None:
            return self._local()
        if self.streaming and place is not None:
            self._hub.load_state_dict(stream)
        elif self.streaming:
            self._hub = self._load()  # one that was read remembers how far
        return self._counted(self._hub_rows(self._place["rows"]))

    def _local(self) -> Iterator[Row]:
        first = self._place["file"]
        for number, file in enumerate(self.files[first:], first):
            if number > first:
                self._place = {"file": number, "rows": 0}
            read = READERS.get(file.suffix, _jsonl)
            yield from self._counted(read(file, self.column, self._place["rows"]))

    def __iter__(self) -> Iterator[Row]:
        return self.begin()

    def _counted(self, rows: Iterator[Row]) -> Iterator[Row]:
        for row in rows:
            self._place["rows"] += 1
            yield row

    def _load(self) -> Any:
        from datasets import load_dataset

        try:
            rows = load_dataset(self.source, split=self.split, streaming=self.streaming)
        except Exception as e:  # the hub's client raises a dozen unrelated kinds
            raise UserError(
                f"dataset.source {self.source} is no file, and the hub gives no split {self.split!r} of it: "
                f"{first_line(e)}"
            ) from e
        names = rows.column_names  # a stream may not know
        if names is not None:
            _value(f"{self.source}, row 1", dict.fromkeys(names, True), self.column)
            rows = rows.select_columns(list(_names(self.column).values()))
        return rows

    def _hub_rows(self, number: int) -> Iterator[Row]:
        rows = iter(self._hub)
        while True:
            try:
                row = next(rows, None)
            except Exception as e:  # as above, now of the network
                raise UserError(
                    f"dataset.source {self.source}: row {number + 1} cannot be read: {first_line(e)}"
                ) from e
            if row is None:
                return
            number += 1
            yield _value(f"{self.source}, row {number}", row, self.column)


def _value(where: str, row: Any, column: Column) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where} is a {type(row).__name__}, not an object with columns")
    for key, name in _names(column).items():
        if row.get(name) is None:
            raise UserError(f"{where} has no column {name!r}, only {sorted(row)}; set dataset.{key}")
    return where, row[column] if isinstance(column, str) else {key: row[name] for key, name in column.items()}


def _names(column: Column) -> Mapping[str, str]:
    return {"column": column} if isinstance(column, str) else column


def _jsonl(file: Path, column: Column, skip: int) -> Iterator[Row]:
    for where, row in jsonl_rows(file, skip):
        yield _value(where, row, column)


def _text(file: Path, column: Column, skip: int) -> Iterator[Row]:
    if not skip:
        yield _value(str(file), {"text": read_file(file)}, column)


def _parquet(file: Path, column: Column, skip: int) -> Iterator[Row]:
    import pyarrow.parquet  # takes a while, and JSONL needs none of it

    try:
        table = pyarrow.parquet.ParquetFile(file)
        _value(f"{file}, row 1", dict.fromkeys(table.schema_arrow.names, True), column)
        number = 0
        columns = list(_names(column).values())
        for group in range(table.num_row_groups):
            if number + (rows := table.metadata.row_group(group).num_rows) <= skip:
                number += rows
                continue
            for batch in table.iter_batches(row_groups=[group], columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    if number > skip:
                        yield _value(f"{file}, row {number}", row, column)
    except (OSError, pyarrow.ArrowException) as e:
        raise UserError(f"{file} cannot be read: {e}") from e


READERS: dict[str, Callable[[Path, Column, int], Iterator[Row]]] = {".parquet": _parquet, ".txt": _text}
