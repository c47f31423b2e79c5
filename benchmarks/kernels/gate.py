"""The gate before the clock: what is not right is not timed."""

from __future__ import annotations

from torch import Tensor


class Wrong(Exception):
    """A contender that computed something else than its reference."""


def relative(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest value wanted; NaN where anything is NaN."""
    got, want = got.double(), want.double()
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))


def must_match(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """Raise Wrong unless got is want up to the tolerance, 0 for every bit."""
    if got.shape != want.shape:
        raise Wrong(f"{name} is {tuple(got.shape)}, wanted {tuple(want.shape)}")
    error = relative(got, want)
    if not error <= tolerance:  # NaN too
        raise Wrong(f"{name} is off by {error:.1e}, allowed {tolerance:.0e}")


def verdict(problem: Exception) -> tuple[str, str]:
    """(status, one line) of what went wrong with a contender."""
    if isinstance(problem, Wrong):
        return "wrong", str(problem)
    return "error", f"{type(problem).__name__}: {' '.join(str(problem).split())[-300:]}"
