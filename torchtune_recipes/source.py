"""Rows of a data set: a local JSONL, Parquet or text file, or a data set of the Hugging Face hub."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mamba_hybrid.errors import UserError
from mamba_hybrid.text import jsonl_rows, read_file

LOCAL = (".jsonl", ".json", ".parquet", ".txt")

Column = str | Mapping[str, str]  # one, or several as key of the configuration -> column


def read_rows(source: str | list[str], column: Column, split: str = "train") -> Iterator[tuple[str, Any]]:
    """Values of one column or of several, row after row.

    Args:
        source: a .jsonl (or .json with a row a line), .parquet or .txt file (one row, its text), a glob pattern
            of such files, a list of these, or the name of a data set on the hub.
        column: whose values are wanted; a .txt file has the column "text". Of several, as {key of the configuration:
            column}, the value is a dict with these keys.
        split: of a data set on the hub.

    Yields:
        (where the row stands, for error messages; its value).

    Raises:
        UserError: no such file or data set, a file that cannot be read, a row without the column.
    """
    if isinstance(source, str) and Path(source).suffix not in LOCAL:
        if Path(source).exists():
            raise UserError(f"dataset.source {source} is none of {', '.join(LOCAL)}")
        yield from _hub(source, column, split)
        return
    for name in [source] if isinstance(source, str) else source:
        files = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        if not files:
            raise UserError(f"dataset.source {name} matches no file")
        for file in map(Path, files):
            if not file.is_file():
                raise UserError(f"dataset.source {file} does not exist")
            if file.suffix == ".parquet":
                yield from _parquet(file, column)
            elif file.suffix == ".txt":
                yield from _text(file, column)
            else:
                yield from _jsonl(file, column)


def _value(where: str, row: Any, column: Column) -> tuple[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where} is a {type(row).__name__}, not an object with columns")
    for key, name in _names(column).items():
        if row.get(name) is None:
            raise UserError(f"{where} has no column {name!r}, only {sorted(row)}; set dataset.{key}")
    return where, row[column] if isinstance(column, str) else {key: row[name] for key, name in column.items()}


def _names(column: Column) -> Mapping[str, str]:
    return {"column": column} if isinstance(column, str) else column


def _jsonl(file: Path, column: Column) -> Iterator[tuple[str, Any]]:
    for where, row in jsonl_rows(file):
        yield _value(where, row, column)


def _text(file: Path, column: Column) -> Iterator[tuple[str, Any]]:
    yield _value(str(file), {"text": read_file(file)}, column)


def _parquet(file: Path, column: Column) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet  # takes a while, and JSONL needs none of it

    try:
        table = pyarrow.parquet.ParquetFile(file)
        _value(f"{file}, row 1", dict.fromkeys(table.schema_arrow.names, True), column)
        number = 0
        for batch in table.iter_batches(columns=list(_names(column).values())):
            for row in batch.to_pylist():
                number += 1
                yield _value(f"{file}, row {number}", row, column)
    except (OSError, pyarrow.ArrowException) as e:
        raise UserError(f"{file} cannot be read: {e}") from e


def _hub(name: str, column: Column, split: str) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=split)
    except Exception as e:  # the hub's client raises a dozen unrelated kinds
        raise UserError(
            f"dataset.source {name} is no file, and the hub gives no split {split!r} of it: {str(e).splitlines()[0]}"
        ) from e
    _value(f"{name}, row 1", dict.fromkeys(rows.column_names, True), column)
    for number, row in enumerate(rows.select_columns(list(_names(column).values())), 1):
        yield _value(f"{name}, row {number}", row, column)
