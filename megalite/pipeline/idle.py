"""Where ranks' time goes in a step, and a recorded run beside its plan's prediction. No torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from megalite.pipeline.picture import Picture
from megalite.pipeline.simulate import Timeline
from megalite.pipeline.trace import PARTS, RankStep, Trace
from megalite.wording import counted


@dataclass(frozen=True)
class Idle:
    """One rank's share of a step's makespan, in the timeline's unit; the fields add up to it.

    Attributes:
        computing: in its actions.
        start: until its first action.
        waits: later, by the rank whose message it waited for.
        end: after its last action.
        between: the rest: starting messages, and whatever its host does.
    """

    computing: float
    start: float
    waits: Mapping[int, float]
    end: float
    between: float


def idle_times(timeline: Timeline) -> list[Idle]:
    """Where each rank's time goes."""
    return [_idle(timeline, rank) for rank in range(timeline.num_ranks)]


def _idle(timeline: Timeline, rank: int) -> Idle:
    spans = sorted((s for s in timeline.spans if s.rank == rank), key=lambda span: span.start)
    waits: dict[int, float] = defaultdict(float)
    for span in spans[1:]:
        if span.waits_for >= 0:
            waits[span.waits_for] += span.waited
    computing, start = timeline.busy(rank), spans[0].start
    end = timeline.makespan - max(span.end for span in spans)
    between = timeline.makespan - computing - start - end - sum(waits.values())
    # Below zero only by rounding.
    return Idle(computing, start, dict(sorted(waits.items())), end, max(0.0, between))


def idle_table(pictures: Sequence[Picture]) -> str:
    """A line per rank and picture; shares of the picture's makespan."""
    headings = ["rank", "", "computing", "start", "end", "between", "waiting for"]
    rows = [headings]
    found = [idle_times(picture.timeline) for picture in pictures]
    for rank in range(pictures[0].plan.num_ranks):
        for picture, idle in zip(pictures, found, strict=True):
            own, length = idle[rank], picture.timeline.makespan
            times = (own.computing, own.start, own.end, own.between)
            waits = [f"rank {peer} {time / length:.1%}" for peer, time in own.waits.items()]
            cells = [f"{time / length:.1%}" for time in times]
            rows.append([str(rank), picture.title, *cells, ", ".join(waits) or "nobody"])
    return _table(rows)


def parts_table(trace: Trace, step: int) -> str:
    """A line per rank: what each part of the step took [ms]."""
    rows = [["rank", *(f"{name} [ms]" for name in PARTS)]]
    for number, rank in enumerate(trace.steps[step]):
        parts = (rank.part(name) for name in PARTS)
        rows.append([str(number), *(f"{1e3 * (part.end - part.start):.3f}" for part in parts)])
    return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def comparison(trace: Trace, step: int, plan: Picture, run: Picture) -> list[str]:
    """A line each: pipeline and step as measured and predicted, bubble, balance.

    The prediction follows from mean times over all recorded steps. What a step does outside of the
    pipeline is no plan's business, so the prediction of a step is that of its pipeline and the rest
    as measured.
    """
    pipeline, whole = run.timeline.makespan, trace.step_time(step)
    predicted = plan.timeline.makespan
    rest = whole - pipeline
    mean = fmean(trace.timeline(number).makespan for number in trace.steps)
    busy = sum(run.timeline.busy(rank) for rank in range(trace.plan.num_ranks))
    share = busy / trace.plan.num_ranks + _optimizer_time(trace.steps[step])
    return [
        f"pipeline     measured {run.show(pipeline)}, predicted {run.show(predicted)}, "
        f"ratio {pipeline / predicted:.3f}; in the mean of {counted(len(trace.steps), 'step')} "
        f"measured {run.show(mean)}, ratio {mean / predicted:.3f}",
        f"step         measured {run.show(whole)}, predicted {run.show(predicted + rest)}, "
        f"ratio {whole / (predicted + rest):.3f}; {run.show(rest)} of both is outside of the "
        "pipeline, as measured",
        f"idle         {1.0 - share / whole:.1%} of the step, the optimizer not counted as idle",
        f"balance cap  {_balance(trace):.1%}: mean rank's computation by that of the slowest",
    ]


def _optimizer_time(ranks: Sequence[RankStep]) -> float:
    """Of the rank that comes to it last, which waits for nobody there."""
    return min(rank.end - rank.part("optimizer").start for rank in ranks)


def _balance(trace: Trace) -> float:
    """What share of the ranks' time is the most that any schedule can use."""
    costs, plan = trace.costs(), trace.plan
    busy = [sum(costs.of(action) for action in order) for order in plan.ranks]
    return sum(busy) / len(busy) / max(busy)
