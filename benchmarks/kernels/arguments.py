"""Arguments of the benchmarks: parsers that name the value and its limit."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def numbers(most: int) -> Callable[[str], tuple[int, ...]]:
    """A parser of whole numbers between commas, from 1 to `most`."""

    def parse(text: str) -> tuple[int, ...]:
        values = []
        for part in text.split(","):
            try:
                values.append(int(part))
            except ValueError:
                raise argparse.ArgumentTypeError(f"{part!r} is not a whole number") from None
            if not 1 <= values[-1] <= most:
                raise argparse.ArgumentTypeError(f"{values[-1]} is not between 1 and {most}")
        return tuple(dict.fromkeys(values))

    return parse


def names(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """A parser of some of the known names between commas."""

    def parse(text: str) -> tuple[str, ...]:
        for part in text.split(","):
            if part not in known:
                raise argparse.ArgumentTypeError(f"{part!r} is none of {', '.join(known)}")
        return tuple(text.split(","))

    return parse


def seconds(text: str) -> float:
    """A parser of a time above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} seconds are not above 0 and finite")
    return value


def new_file(text: str) -> Path:
    """A parser of a file to write, in a folder that is there."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {path.parent} is not there")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder")
    return path
