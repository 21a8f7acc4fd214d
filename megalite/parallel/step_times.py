"""Where the time of each rank's steps goes, from what it is seen doing a few times a second.

The watchdog's thread looks, which costs the rank's own thread nothing. No torch import.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping

SAMPLES = 50
"""So many make the shares of lately: of ten seconds, in worlds of up to a hundred ranks. With fewer
nothing is said."""

WAITING = "waiting for others"

LEAST = 0.01
"""A phase in which no rank is for so much of its time has no column of its own."""

ROWS = 16
"""Ranks of a table; of more, those that wait least and those that wait most."""

Shares = Mapping[str, float]
"""Of a rank's time in its steps, by phase."""


class Samples:
    """What one rank was seen doing in its steps, the first one left out."""

    def __init__(self) -> None:
        self._lately: deque[str] = deque(maxlen=SAMPLES)
        self._ever: Counter[str] = Counter()
        self._steps, self._steps_s = 0, 0.0

    def end_step(self, seconds: float) -> None:
        """A step has ended that was looked at; it took so long [s]."""
        self._steps += 1
        self._steps_s += seconds

    @property
    def mean_step_s(self) -> float:
        """Of the steps that were looked at [s]; 0 before the first one has ended."""
        return self._steps_s / max(1, self._steps)

    def add(self, doing: str, *, waits: bool) -> None:
        """One more: `stage 0, micro-batch 1, forward` counts as `forward`."""
        phase = WAITING if waits else doing.rpartition(", ")[2] or "other work"
        self._lately.append(phase)
        self._ever[phase] += 1

    def lately(self) -> Shares:
        """Of the last samples; empty until there are enough."""
        return _shares(Counter(self._lately))

    def ever(self) -> Shares:
        """Of all samples; empty until there are enough."""
        return _shares(self._ever)


def _shares(seen: Counter[str]) -> Shares:
    count = seen.total()
    return {phase: n / count for phase, n in seen.most_common()} if count >= SAMPLES else {}


def table(shares: Mapping[str, Shares], step_s: float) -> str:
    """A row of each rank: how long it is in each phase of a step [ms].

    Args:
        shares: of the ranks, by what they are called, in order.
        step_s: time of a step, the same for all of them [s].

    Returns:
        Lines; empty if of a rank too little is known.
    """
    if not shares or not all(shares.values()):
        return ""
    total: Counter[str] = Counter()
    for each in shares.values():
        total.update(each)
    columns = [
        phase
        for phase, _ in total.most_common()
        if phase != WAITING and max(each.get(phase, 0.0) for each in shares.values()) >= LEAST
    ]
    rows = {
        name: [
            *(each.get(phase, 0.0) for phase in columns),
            sum(s for phase, s in each.items() if phase not in (*columns, WAITING)),
            each.get(WAITING, 0.0),
        ]
        for name, each in shares.items()
    }
    heads = [*columns, "other", WAITING]
    width = max(map(len, ["rank", *rows]))
    lines = [f"{'rank':<{width}s}" + "".join(f"  {head}" for head in heads)]
    for name in _shown(rows):
        cells = zip(heads, rows[name], strict=True)
        told = "".join(f"  {1e3 * step_s * share:>{len(head)}.1f}" for head, share in cells)
        lines.append(f"{name:<{width}s}{told}")
    left_out = len(rows) - len(lines) + 1
    if left_out:
        lines.insert(1 + ROWS // 2, f"... {left_out} more, between these in how long they wait")
    return "\n".join(lines)


def _shown(rows: Mapping[str, list[float]]) -> list[str]:
    """The names of the rows of a table."""
    if len(rows) <= ROWS:
        return list(rows)
    by_waiting = sorted(rows, key=lambda name: rows[name][-1])
    return [*by_waiting[: ROWS // 2], *by_waiting[-(ROWS // 2) :]]
