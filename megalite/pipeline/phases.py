"""One rank's order, written phase by phase. No torch import."""

from __future__ import annotations

from collections import defaultdict

from megalite.pipeline.actions import Action, Op, Order


class Phases:
    """Kinds of action in turn, so many times; each kind counts its micro-batches for itself."""

    def __init__(self) -> None:
        self._order: list[Action] = []
        self._next: dict[tuple[int, Op], int] = defaultdict(int)

    def repeat(self, times: int, *kinds: tuple[int, Op]) -> None:
        """Add the kinds, each a stage and an operation, one after the other, so many times."""
        for _ in range(times):
            for kind in kinds:
                self._order.append(Action(*kind, self._next[kind]))
                self._next[kind] += 1

    def order(self, num_micro_batches: int) -> Order:
        """What was added, without the micro-batches that a short step does not have.

        A phase may count more of them than there are. What is left of a valid order is valid, since
        no micro-batch needs another.
        """
        return tuple(a for a in self._order if a.micro_batch < num_micro_batches)
