"""Files that commands write."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import UserError


def check_output(flag: str, path: str | Path) -> None:
    """Look before a long run whether a file can be written after it.

    Args:
        flag: the command's, for the message.
        path: of the file, which may exist.

    Raises:
        UserError: it is a directory, or its own directory is not there.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{flag} {path} is a directory; give a file")
    if not path.parent.is_dir():
        raise UserError(f"{flag} {path}: there is no directory {path.parent}")


def write_output(flag: str, path: str | Path, data: bytes) -> None:
    """Write the file, whole or not at all: what stood there stays where that fails.

    Args:
        flag: the command's, for the message.
        path: of the file. A link is followed; what is no file (a pipe, a terminal) is written to.
        data: its contents.

    Raises:
        UserError: it cannot be written.
    """
    file = Path(path).resolve()
    new = file.with_name(f".{file.name}.new")
    try:
        if Path(path).exists() and not Path(path).is_file():
            Path(path).write_bytes(data)
            return
        new.write_bytes(data)
        new.replace(file)
    except OSError as e:
        new.unlink(missing_ok=True)
        raise UserError(f"{flag} {path} cannot be written: {e.strerror}") from e


def to_disk(path: Path) -> None:
    """Wait until a file, or of a directory its list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
