"""What is drawn of a step, whoever draws it, and the figures beside it. No torch import."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from types import MappingProxyType

from megalite.pipeline.actions import COMPUTE, Op, Plan
from megalite.pipeline.check import check_program
from megalite.pipeline.costs import Costs
from megalite.pipeline.lower import lower
from megalite.pipeline.simulate import Timeline, simulate
from megalite.pipeline.trace import Part, Trace

WORDS: Mapping[Op, str] = MappingProxyType(
    {
        Op.FORWARD: "forward",
        Op.BACKWARD: "backward",
        Op.INPUT_GRADIENT: "input gradient",
        Op.WEIGHT_GRADIENT: "weight gradient",
    }
)

SHORTEST = 0.25
"""Of the longest operation's time: shorter ones get no scale of their own."""


@dataclass(frozen=True)
class Picture:
    """One step of a plan, simulated or measured.

    Attributes:
        title: what it is.
        plan: that is followed.
        timeline: when each action runs.
        costs: whose sizes the memory is counted in.
        in_seconds: whether times are seconds, and not the caller's units.
        parts: (rank, part) of what a rank did around the plan's actions, on the timeline's clock.
    """

    title: str
    plan: Plan
    timeline: Timeline
    costs: Costs
    in_seconds: bool = False
    parts: tuple[tuple[int, Part], ...] = ()

    @cached_property
    def chunks(self) -> tuple[int, ...]:
        """Of each stage: which of its rank's stages it is, 0 first."""
        seen: dict[int, int] = defaultdict(int)
        numbers = []
        for rank in self.plan.stage_rank:
            numbers.append(seen[rank])
            seen[rank] += 1
        return tuple(numbers)

    @property
    def num_chunks(self) -> int:
        """Stages of the rank that has most."""
        return max(self.chunks) + 1

    @cached_property
    def ops(self) -> tuple[Op, ...]:
        """The operations in it."""
        found = {span.action.op for span in self.timeline.spans}
        return tuple(op for op in COMPUTE if op in found)

    @cached_property
    def unit(self) -> float:
        """The time that should be as wide as a label: of the shortest operation."""
        times: dict[Op, list[float]] = defaultdict(list)
        for span in self.timeline.spans:
            times[span.action.op].append(span.end - span.start)
        means = [fmean(each) for each in times.values()]
        return max(min(means), SHORTEST * max(means))

    def show(self, time: float) -> str:
        """A time for people."""
        if not self.in_seconds:
            return f"{time:.4g}"
        return f"{time:.4g} s" if time >= 1 else f"{1e3 * time:.4g} ms"

    def figures(self) -> list[str]:
        """A line each: length, bubble, memory."""
        step = self.timeline
        peaks = " ".join(f"{self.costs.peak(order):.4g}" for order in self.plan.ranks)
        return [
            f"makespan     {self.show(step.makespan)}",
            f"bubble       {step.bubble():.1%} of all ranks' time; "
            f"{step.bubble_of_spans():.1%} of the idlest rank's, first action to last",
            f"peak memory  {peaks} by rank, in one micro-batch's activations on one stage",
        ]


def planned(plan: Plan, costs: Costs, title: str = "", *, in_seconds: bool = False) -> Picture:
    """A plan as it would run.

    Raises:
        PlanError: it is not whole, or it would hang.
    """
    program = lower(plan, costs)
    check_program(program)
    return Picture(title or plan.name, plan, simulate(program, costs), costs, in_seconds)


def measured(trace: Trace, step: int, title: str) -> Picture:
    """A recorded step as it ran, from the begin of its pipeline on."""
    zero = trace.start(step)
    parts = tuple(
        (number, Part(part.name, part.start - zero, part.end - zero))
        for number, rank in enumerate(trace.steps[step])
        for part in rank.parts
        if part.name != "pipeline"
    )
    return Picture(title, trace.plan, trace.timeline(step), trace.costs(), True, parts)
