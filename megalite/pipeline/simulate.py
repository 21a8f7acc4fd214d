"""When each action of a program would run, given how long they take. No torch import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megalite.pipeline.actions import Action, Exchange, Op, Program
from megalite.pipeline.check import counterpart


@dataclass(frozen=True)
class Span:
    """One computation of one rank, in the durations' unit of time."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A simulated step.

    Attributes:
        spans: all computations.
        makespan: when the last one ends.
        peak_live: for each rank, the most micro-batches between their forward and the end of their
            backward at one time, summed over the rank's stages.
    """

    spans: tuple[Span, ...]
    makespan: float
    peak_live: tuple[int, ...]

    def bubble(self) -> float:
        """Idle share of the ranks' time."""
        busy = sum(span.end - span.start for span in self.spans)
        return 1.0 - busy / (len(self.peak_live) * self.makespan)


def simulate(program: Program, durations: Mapping[Op, float]) -> Timeline:
    """Run a checked program against a clock.

    A computation starts when the rank is free and its messages have arrived. Messages take no time,
    but block as in `check_program`: an exchange ends when all its messages have met.

    Args:
        program: free of deadlock.
        durations: of forward and backward.
    """
    clock = [0.0] * len(program.ranks)
    position = [0] * len(program.ranks)
    posted: dict[Action, float] = {}
    spans: list[Span] = []
    left = sum(len(steps) for steps in program.ranks)
    while left:
        before = left
        for rank, steps in enumerate(program.ranks):
            while position[rank] < len(steps):
                step = steps[position[rank]]
                if isinstance(step, Exchange):
                    for message in step.messages:
                        posted.setdefault(message, clock[rank])
                    others = [counterpart(message) for message in step.messages]
                    if any(other not in posted for other in others):
                        break
                    clock[rank] = max(clock[rank], *(posted[other] for other in others))
                else:
                    end = clock[rank] + durations[step.op]
                    spans.append(Span(rank, step, clock[rank], end))
                    clock[rank] = end
                position[rank] += 1
                left -= 1
        assert left < before, "simulate needs a program without deadlock"
    return Timeline(tuple(spans), max(clock), _peak_live(program))


def _peak_live(program: Program) -> tuple[int, ...]:
    peaks = []
    for order in program.plan.ranks:
        live = peak = 0
        for action in order:
            live += {Op.FORWARD: 1, Op.BACKWARD: -1}.get(action.op, 0)
            peak = max(peak, live)
        peaks.append(peak)
    return tuple(peaks)
