"""Which rank is slower than the others? From what ranks were seen doing lately.

Ranks go in step, so a slow one makes all others wait and their steps take equally long. What tells
it apart is how much of the time it does not wait (`megalite.parallel.step_times`). No torch import.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megalite.parallel.hang import State
from megalite.parallel.step_times import WAITING, Shares

EVERY = 10
"""After so many samples ranks are compared again."""

IN_A_ROW = 3
"""Comparisons in which a rank has to be slow."""

FACTOR, LEAST = 1.5, 0.2
"""It computes for so many times as long as the median rank, and for so much more of all time."""


@dataclass(frozen=True)
class Straggler:
    """A rank for which the others wait.

    Attributes:
        rank: world rank.
        host: its machine.
        computes: share of its time in which it doesn't wait.
        median: that of the median rank.
        phase: in which it is most of that time.
    """

    rank: int
    host: str
    computes: float
    median: float
    phase: str

    def __str__(self) -> str:
        return (
            f"rank {self.rank} on {self.host} keeps others waiting: it computes "
            f"{self.computes:.0%} of the time, the median rank {self.median:.0%}; most of it in: "
            f"{self.phase}"
        )


class Stragglers:
    """Compares ranks again and again, and names each slow one once, until it has caught up."""

    def __init__(self) -> None:
        self._slow: Counter[int] = Counter()

    def compare(self, states: Sequence[State | None]) -> list[Straggler]:
        """Those that have become slow.

        Args:
            states: of all ranks; nothing is said before all have enough samples.
        """
        times = {state.rank: state.shares for state in states if state is not None}
        if len(times) < len(states) or not all(times.values()):
            return []
        computes = {rank: 1.0 - shares.get(WAITING, 0.0) for rank, shares in times.items()}
        median = statistics.median_low(computes.values())  # of two ranks the other one's
        found = []
        for state in filter(None, states):
            share = computes[state.rank]
            if share <= max(FACTOR * median, median + LEAST):
                del self._slow[state.rank]
                continue
            self._slow[state.rank] += 1
            if self._slow[state.rank] == IN_A_ROW:
                phase = _most(state.shares)
                found.append(Straggler(state.rank, state.host, share, median, phase))
        return found


def _most(shares: Shares) -> str:
    """The phase, other than waiting, that takes the most."""
    return max((share, phase) for phase, share in shares.items() if phase != WAITING)[1]
