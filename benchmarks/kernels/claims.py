"""What a benchmark must show: each claim judged by its worst case among the rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """A figure that must be at least so large, or at most, in every row that the claim is about.

    Args:
        text: the claim.
        about: which rows.
        figure: of a row, None where it has none.
        least, most: the bound, one of them.
    """

    text: str
    about: Callable
    figure: Callable
    least: float | None = None
    most: float | None = None

    def judge(self, rows: list, case: Callable[[object], str]) -> str:
        """PASS or MISS, the claim and its worst case; ---- where no row is about it. A row without the figure, such
        as a wrong contender's, misses."""
        rows = [row for row in rows if self.about(row)]
        if not rows:
            return f"---- {self.text}: not measured"
        for row in rows:
            if self.figure(row) is None:
                return f"MISS {self.text}: no figure at {case(row)}"
        if self.least is not None:
            worst = min(rows, key=self.figure)
            met = self.figure(worst) >= self.least
        else:
            worst = max(rows, key=self.figure)
            met = self.figure(worst) <= self.most
        return f"{'PASS' if met else 'MISS'} {self.text}: {self.figure(worst):.2f} at worst, {case(worst)}"
