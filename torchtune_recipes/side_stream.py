"""Work that needs nothing of the student, on a stream of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class SideStream:
    """Makes something on a CUDA stream of its own, for the stream that trains.

    A teacher's forward pass is bound by arithmetic, an optimiser's step by memory: the pass of the next rows, on this
    stream, waits for no step, so a GPU does both at once. What is made may read constants (the teacher's weights) and
    what was made here before, and nothing that the other stream still writes.

    Args:
        device: where the work runs. Only on a GPU is there a stream.
        on: False to do all on the stream that trains.

    Example:
        >>> side = SideStream(torch.device("cpu"))
        >>> side(lambda: torch.ones(2))
        tensor([1., 1.])
    """

    def __init__(self, device: torch.device, on: bool = True) -> None:
        self.stream = torch.cuda.Stream(device) if on and device.type == "cuda" else None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())  # for the constants

    def __call__(self, make: Callable[[], T]) -> T:
        """What `make` returns: a tensor, or tuples of them."""
        if self.stream is None:
            return make()
        here = torch.cuda.current_stream()
        with torch.cuda.stream(self.stream):
            made = make()
        here.wait_stream(self.stream)
        for t in _tensors(made):
            t.record_stream(here)  # or this stream would be given its memory again before the other has read it
        return made


def _tensors(made: Any) -> Iterator[Tensor]:
    if isinstance(made, Tensor):
        yield made
    elif isinstance(made, tuple):
        for part in made:
            yield from _tensors(part)
