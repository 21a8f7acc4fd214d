"""What recorded steps say of a schedule. No torch.

All shares are of the ranks' time, 1 being all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from megalite.pipeline.actions import Op, Plan
from megalite.pipeline.costs import Costs
from megalite.pipeline.idle import idle_times
from megalite.pipeline.lower import lower
from megalite.pipeline.simulate import Timeline, simulate
from megalite.pipeline.trace import RankStep, Trace, maker


@dataclass(frozen=True)
class Figures:
    """Of one schedule.

    Attributes:
        recorded_s: mean time of the recorded steps.
        predicted_s: of a step: its pipeline as simulated with the stages' mean times in these
            steps, and what is outside of the pipeline as it was there.
        bubble: 1 - busy / (ranks x step time); the actions and the optimizer are busy.
        span_bubble: the zero-bubble papers' figure: idle share of the idlest rank from its first
            action to its last; the optimizer has no part in it.
        bubble_of_1f1b: (p - 1) / (n + p - 1).
        cap: mean of the ranks' computing over that of the slowest: what no schedule can pass.
        waiting: for messages, the other rank's computing included, after a rank's first action.
        exposed: of that the time from when the message's content was made: communication that
            nothing hides.
        stage_s: the shortest forward of a stage.
        stage_times: mean times of each stage's actions, for people.
    """

    recorded_s: float
    predicted_s: float
    bubble: float
    span_bubble: float
    bubble_of_1f1b: float
    cap: float
    waiting: float
    exposed: float
    stage_s: float
    stage_times: str


def figures(trace: Trace) -> Figures:
    """The figures of a schedule, of its recorded steps."""
    plan, costs = trace.plan, trace.costs()
    ranks, count = plan.num_ranks, plan.num_micro_batches
    timelines = {step: trace.timeline(step) for step in trace.steps}
    recorded_s = fmean(trace.step_time(step) for step in trace.steps)
    pipeline_s = fmean(timeline.makespan for timeline in timelines.values())
    predicted_s = simulate(lower(plan, costs), costs).makespan
    busy = [fmean(each.busy(rank) for each in timelines.values()) for rank in range(ranks)]
    optimizer_s = fmean(_optimizer_s(step) for step in trace.steps.values())
    waited = [sum(idle.waits.values()) for t in timelines.values() for idle in idle_times(t)]
    exposed = [_exposed_s(trace, timeline) / ranks for timeline in timelines.values()]
    return Figures(
        recorded_s=recorded_s,
        predicted_s=predicted_s + recorded_s - pipeline_s,
        bubble=1.0 - (fmean(busy) + optimizer_s) / recorded_s,
        span_bubble=fmean(timeline.bubble_of_spans() for timeline in timelines.values()),
        bubble_of_1f1b=(ranks - 1) / (count + ranks - 1),
        cap=fmean(busy) / max(busy),
        waiting=fmean(waited) / recorded_s,
        exposed=fmean(exposed) / recorded_s,
        stage_s=min(costs.forward),
        stage_times=_stage_times(plan, costs),
    )


def _stage_times(plan: Plan, costs: Costs) -> str:
    """`F 11.0 11.2, B 30.1 30.3 ms`: of each stage, first to last."""
    times = {
        Op.FORWARD: costs.forward,
        Op.BACKWARD: costs.backward,
        Op.INPUT_GRADIENT: costs.input_gradient,
        Op.WEIGHT_GRADIENT: costs.weight_gradient,
    }
    taken = {action.op for order in plan.ranks for action in order}
    told = [
        f"{op} {' '.join(f'{1e3 * s:.2f}' for s in of)}" for op, of in times.items() if op in taken
    ]
    return ", ".join(told) + " ms"


def _optimizer_s(ranks: Sequence[RankStep]) -> float:
    """Of the rank that comes to it last, which waits for nobody there."""
    return min(rank.end - rank.part("optimizer").start for rank in ranks)


def _exposed_s(trace: Trace, timeline: Timeline) -> float:
    """Sum over ranks: time waited for messages whose content was there [s]."""
    spans = {span.action: span for span in timeline.spans}
    total = 0.0
    for action, span in spans.items():
        made_by = maker(trace.plan, action, spans)
        if made_by is not None:
            begun = max(spans[made_by].end, span.start - span.waited)
            total += max(0.0, span.start - begun)
    return total
