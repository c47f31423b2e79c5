"""The output file of batch generation: a row for each answered request, appended as it is answered."""

from __future__ import annotations

import fcntl
import io
import json
import os
from pathlib import Path
from typing import Any

from mamba_hybrid.errors import UserError


class Results:
    """An output file that a later run continues.

    Args:
        path: of the file. A last line that a killed run left unfinished is cut off.
        settings: what all its rows were made with; each row records it.
        inputs: row by id, as asked now.
        overwrite: start again, whatever is there; it goes when the first new row comes.

    Raises:
        UserError: the file cannot be written, another run is writing it, or its rows were made with something else
            or answer other prompts.

    Example:
        >>> with Results("out.jsonl", settings, inputs) as results:
        ...     if 7 not in results.done:
        ...         results.append({"id": 7, ...})
    """

    def __init__(
        self, path: str | Path, settings: dict[str, Any], inputs: dict[str | int, dict], *, overwrite: bool = False
    ) -> None:
        self.path, self.settings = Path(path), settings
        self.done: set[str | int] = set()
        self._outdated = overwrite
        self._created = not self.path.exists()
        try:
            self._file = self.path.open("a+b", buffering=0)  # or close() would write again what the disk has not taken
        except OSError as e:
            raise UserError(f"--output {path} cannot be written: {e.strerror}") from e
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise UserError(f"--output {path} is being written by another run; give another file") from e
            except OSError as e:
                raise UserError(f"--output {path} cannot be locked: {e.strerror}; put it on another disk") from e
            if not overwrite:
                self._resume(inputs)
        except BaseException:
            self._file.close()
            raise

    def _resume(self, inputs: dict[str | int, dict]) -> None:
        self._file.seek(0)
        end = 0
        lines = io.BufferedReader(self._file)
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break  # cut off in the middle
            self._check(number, line, inputs)
            end += len(line)
        lines.detach()
        self._file.truncate(end)
        self._file.seek(0, os.SEEK_END)

    def _check(self, number: int, line: bytes, inputs: dict[str | int, dict]) -> None:
        where, way_out = f"{self.path}, line {number}", "give another --output, or --overwrite to start again"
        try:
            row = json.loads(line)
            id, data, settings = row["id"], row["input"], dict(row["settings"])
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{where} is no row of an earlier run; {way_out}") from e
        for name, now in self.settings.items():
            if settings.get(name) != now:
                raise UserError(f"{where} was made with {name} {settings.get(name)!r}, not {now!r}; {way_out}")
        if id in inputs and inputs[id] != data:
            raise UserError(f"{where} answers another prompt under id {id!r} than the input now has; {way_out}")
        self.done.add(id)

    def append(self, row: dict[str, Any]) -> None:
        """Write a row at once, so that a killed run loses nothing it has answered.

        Raises:
            UserError: it cannot be written, the disk being full for one; what was written of it is cut off by the next
                run.
        """
        line = json.dumps(row | {"settings": self.settings}, ensure_ascii=False).encode() + b"\n"
        try:
            if self._outdated:
                self._file.truncate(0)
                self._outdated = False
            while line:
                line = line[self._file.write(line) :]
        except OSError as e:
            raise UserError(f"--output {self.path} cannot be written: {e.strerror}; make room and run again") from e

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        empty = self._file.tell() == 0
        self._file.close()
        if empty and self._created:  # the engine did not start
            self.path.unlink()
