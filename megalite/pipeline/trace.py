"""What the ranks of a pipeline did in the recorded steps of a real run. No torch import."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from megalite.pipeline.actions import Action, Op, Plan
from megalite.pipeline.costs import Costs
from megalite.pipeline.simulate import Span, Timeline

FIRST_STEP = 4
"""Steps before it warm up: they allocate memory, load kernels and connect ranks; and by what they
measure, messages and weight gradients are placed anew after the third."""

PARTS = ("samples", "pipeline", "gradient sums", "optimizer")
"""Of a step: reading samples and counting their tokens; the plan's actions; what is left of the
sums of gradients over ranks, and the loss; clipping and moving the weights."""


def traced_steps(count: int) -> range:
    """The steps (1 first) that `--trace-steps` records."""
    return range(FIRST_STEP, FIRST_STEP + count)


@dataclass(frozen=True)
class Part:
    """A part of a step of one rank [s]; see `PARTS`."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class RankStep:
    """What one rank did in one step [s].

    Attributes:
        step: 1 first.
        parts: one after the other.
        spans: the actions, in order.
    """

    step: int
    parts: tuple[Part, ...]
    spans: tuple[Span, ...]

    @property
    def start(self) -> float:
        """Begin of the step."""
        return self.parts[0].start

    @property
    def end(self) -> float:
        """End of the step."""
        return self.parts[-1].end

    def part(self, name: str) -> Part:
        """The part of a name in `PARTS`."""
        return next(part for part in self.parts if part.name == name)


@dataclass(frozen=True)
class Trace:
    """The recorded steps of a run.

    Attributes:
        plan: that they followed.
        steps: by number, what each pipeline rank did.
    """

    plan: Plan
    steps: Mapping[int, tuple[RankStep, ...]]

    def start(self, step: int) -> float:
        """When the first rank began the step's pipeline [s]."""
        return min(rank.part("pipeline").start for rank in self.steps[step])

    def timeline(self, step: int) -> Timeline:
        """The step's actions on all ranks, from the begin of its pipeline on [s]."""
        zero = self.start(step)
        spans = [
            Span(s.rank, s.action, s.start - zero, s.end - zero, s.waits_for, s.waited)
            for rank in self.steps[step]
            for s in rank.spans
        ]
        spans.sort(key=lambda span: (span.start, span.rank))
        return Timeline(tuple(spans), max(span.end for span in spans), self.plan.num_ranks)

    def step_time(self, step: int) -> float:
        """From the first rank's begin of the step to the last one's end [s]."""
        ranks = self.steps[step]
        return max(rank.end for rank in ranks) - min(rank.start for rank in ranks)

    def typical_step(self) -> int:
        """The step of median length, the longer of two."""
        ordered = sorted(self.steps, key=self.step_time)
        return ordered[len(ordered) // 2]

    def costs(self) -> Costs:
        """What the actions took, as means over micro-batches and steps [s]."""
        ranks = [rank for step in self.steps.values() for rank in step]
        return mean_costs(self.plan, [rank.spans for rank in ranks])


def mean_costs(plan: Plan, recorded: Sequence[Sequence[Span]]) -> Costs:
    """Means over micro-batches and steps [s].

    An operation that a stage does not have costs what follows from the others, or nothing. A
    message takes the median time from the end of the action that made it to the start of one that
    waited for it.

    Args:
        plan: that was followed.
        recorded: spans of ranks and steps; each item is one rank's in one step, in order.
    """
    found: dict[tuple[Op, int], list[float]] = defaultdict(list)
    for spans in recorded:
        for span in spans:
            found[span.action.op, span.action.stage].append(span.end - span.start)

    def mean(op: Op) -> list[float]:
        return [fmean(found[op, stage] or [0.0]) for stage in range(plan.num_stages)]

    inputs, weights = mean(Op.INPUT_GRADIENT), mean(Op.WEIGHT_GRADIENT)
    both = [i + w for i, w in zip(inputs, weights, strict=True)]
    whole = [measured or sums for measured, sums in zip(mean(Op.BACKWARD), both, strict=True)]
    ones = (1.0,) * plan.num_stages
    return Costs(
        forward=tuple(mean(Op.FORWARD)),
        backward=tuple(whole),
        input_gradient=tuple(inputs),
        weight_gradient=tuple(weights),
        message=_message_time(plan, recorded),
        kept=ones,
        kept_for_weights=ones,
    )


def maker(plan: Plan, action: Action, actions: Mapping[Action, Any]) -> Action | None:
    """The one of the actions, on another rank, that made an action's input; None if none did."""
    source = plan.source(action)
    if source is None or not plan.is_remote(action.stage, source[0]):
        return None
    stage, direction = source
    made_by = (direction,) if direction is Op.FORWARD else (Op.BACKWARD, Op.INPUT_GRADIENT)
    candidates = (Action(stage, op, action.micro_batch) for op in made_by)
    return next((candidate for candidate in candidates if candidate in actions), None)


def _message_time(plan: Plan, recorded: Sequence[Sequence[Span]]) -> float:
    """Of messages that somebody waited for [s]; 0 if nobody did."""
    # One rank's spans of each step in turn: the n-th of a rank belongs to the n-th step.
    by_step: dict[int, dict[Action, Span]] = defaultdict(dict)
    seen: dict[int, int] = defaultdict(int)
    for spans in recorded:
        if spans:
            by_step[seen[spans[0].rank]].update({span.action: span for span in spans})
            seen[spans[0].rank] += 1
    times = []
    for step in by_step.values():
        for action, span in step.items():
            made = maker(plan, action, step)
            if made is not None and span.start - span.waited < step[made].end:
                times.append(max(0.0, span.start - step[made].end))
    return median(times) if times else 0.0
