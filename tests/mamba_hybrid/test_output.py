"""Files that commands write."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from mamba_hybrid.errors import UserError
from mamba_hybrid.output import write_output


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "table.csv"
    write_output("--out", file, b"before")

    def full(*args: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("mamba_hybrid.output.shutil.copymode", full)  # after the new file is written
    with pytest.raises(UserError, match=r"--out .*table\.csv cannot be written: No space left on device"):
        write_output("--out", file, b"after")
    monkeypatch.undo()
    assert file.read_bytes() == b"before" and list(tmp_path.iterdir()) == [file]
    file.chmod(0o600)
    write_output("--out", file, b"after")
    assert file.read_bytes() == b"after" and file.stat().st_mode & 0o777 == 0o600 and list(tmp_path.iterdir()) == [file]


def test_a_new_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_output("--out", tmp_path / "table.csv", b"rows")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["tempfile.mkstemp", "os.replace"])
def test_a_file_that_cannot_be_replaced_is_written_to(tmp_path, monkeypatch, call):
    def refused(*args: object, **kwargs: object) -> None:
        raise OSError(16, os.strerror(16))

    file = tmp_path / "mounted"
    file.write_bytes(b"before")
    monkeypatch.setattr(f"mamba_hybrid.output.{call}", refused)
    write_output("--out", file, b"after")
    assert file.read_bytes() == b"after" and list(tmp_path.iterdir()) == [file]


def test_a_link_is_followed(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(file)
    for data in (b"1", b"2"):
        write_output("--out", link, data)
        assert link.is_symlink() and file.read_bytes() == data


def test_a_pipe_is_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_output("--json", pipe, b"figures")
    reader.join(10)
    assert got == [b"figures"] and pipe.is_fifo()


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--out .*no/file cannot be written: No such file"):
        write_output("--out", tmp_path / "no" / "file", b"")
