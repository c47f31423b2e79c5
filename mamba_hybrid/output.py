"""Files that commands write."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
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
    """Write the file. Where one stands there it is replaced whole or stays as it was, if its directory allows that.

    Args:
        flag: the command's, for the message.
        path: of the file; through a link, a pipe or a terminal it is written to.
        data: its contents.

    Raises:
        UserError: it cannot be written; of a new file no part is left then.
    """
    file = Path(path)
    exists = os.path.lexists(file)
    try:
        if not (file.is_file() and not file.is_symlink() and _replace(file, data)):
            file.write_bytes(data)
    except OSError as e:
        if not exists:
            with suppress(OSError):
                file.unlink()
        raise UserError(f"{flag} {path} cannot be written: {e.strerror}") from e


def _replace(file: Path, data: bytes) -> bool:
    """Put a new file in an old one's place; False where its directory does not allow that."""
    with file.open("r+b"):  # may it be written?
        pass
    try:
        handle, new = tempfile.mkstemp(prefix=".", dir=file.parent)
    except OSError:
        return False
    try:
        with open(handle, "wb") as f:
            f.write(data)
        shutil.copymode(file, new)
        try:
            os.replace(new, file)
        except OSError:  # a mount point
            return False
    finally:
        Path(new).unlink(missing_ok=True)
    return True


def to_disk(path: Path) -> None:
    """Wait until a file, or of a directory its list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
