"""Where the weight gradients of split backwards go: into the waits of a plan. No torch import."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from heapq import heappop, heappush

from megalite.pipeline.actions import Action, Op, Order, Plan, PlanError
from megalite.pipeline.costs import Costs
from megalite.pipeline.timing import Clock, end_times

_TRIALS = 6
"""Lengths of the step that are tried. More of them found nothing in 776 plans of up to 8 ranks."""


def place_weight_gradients(plan: Plan, costs: Costs, limits: Sequence[float]) -> Plan:
    """Add a weight gradient for each input gradient of a plan.

    Weight gradients have no one waiting for them, so they run while a rank waits for a message, or
    when what they keep is needed for the next forward, or at the end. Orders of the other actions
    stay as they are.

    One that is longer than the wait makes what follows late. How late that may be follows from the
    length that the step shall have, so this length is searched: between what no plan can beat and
    the best found so far.

    Source: after the greedy scheduler of Qi et al., "Zero Bubble Pipeline Parallelism",
    arXiv:2401.10241, section 3.1: simulated with measured costs under a limit of memory, the best
    of several settings.

    Args:
        plan: forwards and input gradients.
        costs: their times and sizes.
        limits: the most that each rank shall keep, in the unit of sizes; a rank keeps more only if
            its order of forwards and input gradients alone does.

    Raises:
        PlanError: the plan would hang.
    """
    ends = end_times(plan, costs)
    rest = _least_rest(plan, costs, ends)
    least = max(end - costs.of(action) + rest[action] for action, end in ends.items())
    best, shortest = _place(plan, costs, limits, rest, math.inf)
    target = least
    for _ in range(_TRIALS):
        if shortest <= least:
            break
        placed, makespan = _place(plan, costs, limits, rest, target)
        if makespan > target:
            least = target
        if makespan < shortest:
            best, shortest = placed, makespan
        target = (least + shortest) / 2
    return best


def _least_rest(plan: Plan, costs: Costs, ends: Mapping[Action, float]) -> Mapping[Action, float]:
    """Least time from the start of each action to the end of the step.

    That is what its own rank has yet to do, weight gradients to come among it; or the longest way
    on through other ranks, if that takes more.
    """
    rest: dict[Action, float] = {}
    work = [0.0] * plan.num_ranks
    following = [0.0] * plan.num_ranks
    awaited: dict[tuple[int, Op, int], float] = {}
    for action in reversed(list(ends)):
        stage, i, rank = action.stage, action.micro_batch, plan.stage_rank[action.stage]
        is_forward = action.op is Op.FORWARD
        work[rank] += costs.of(action) + (0.0 if is_forward else costs.weight_gradient[stage])
        result = stage, Op.FORWARD if is_forward else Op.BACKWARD, i
        onward = costs.of(action) + max(following[rank], awaited.get(result, 0.0))
        rest[action] = following[rank] = max(work[rank], onward)
        source = plan.source(action)
        if source is not None:
            message = costs.message if plan.is_remote(stage, source[0]) else 0.0
            awaited[*source, i] = message + rest[action]
    return rest


def _place(
    plan: Plan, costs: Costs, limits: Sequence[float], rest: Mapping[Action, float], target: float
) -> tuple[Plan, float]:
    """The plan with weight gradients, and its makespan.

    Args:
        rest: of the step from the start of each action.
        target: length of the step that weight gradients must not make impossible.
    """
    clock = Clock(plan, costs)
    ranks = [
        _Rank(order, costs, limit, rest, target)
        for order, limit in zip(plan.ranks, limits, strict=True)
    ]
    # The rank that is furthest behind goes first: whatever another one does ends later than its
    # clock.
    ready = [(0.0, number) for number, order in enumerate(plan.ranks) if order]
    blocked: set[int] = set()
    while ready:
        _, number = heappop(ready)
        rank = ranks[number]
        action = rank.choose(clock)
        if action is None:
            blocked.add(number)
            continue
        rank.run(action, clock)
        if not rank.is_done():
            heappush(ready, (rank.now, number))
        for stage in (action.stage - 1, (action.stage + 1) % plan.num_stages):
            neighbour = plan.stage_rank[stage]
            if neighbour in blocked:
                blocked.remove(neighbour)
                heappush(ready, (ranks[neighbour].now, neighbour))
    if blocked:
        waiting = ", ".join(
            f"rank {number} in {ranks[number].next()}" for number in sorted(blocked)
        )
        raise PlanError(f"plan {plan.name} would hang: {waiting}")
    placed = replace(plan, ranks=tuple(tuple(rank.order) for rank in ranks))
    return placed, max(rank.now for rank in ranks)


class _Rank:
    """One rank's way through its order."""

    def __init__(
        self,
        planned: Order,
        costs: Costs,
        limit: float,
        rest: Mapping[Action, float],
        target: float,
    ):
        self._planned, self._costs, self._limit = deque(planned), costs, limit
        self._rest, self._target = rest, target
        self._deferred: deque[Action] = deque()
        self._kept = 0.0
        self.now = 0.0
        self.order: list[Action] = []

    def next(self) -> Action:
        """The next action of the order that was given."""
        return self._planned[0]

    def is_done(self) -> bool:
        """Whether nothing is left."""
        return not self._planned and not self._deferred

    def choose(self, clock: Clock) -> Action | None:
        """What to do now; None: to wait for what no other rank has begun yet."""
        if not self._planned:
            return self._deferred[0]
        action = self.next()
        arrival = clock.arrival(action)
        if self._deferred and self._has_room(action, arrival):
            return self._deferred[0]
        return None if arrival is None else action

    def _has_room(self, action: Action, arrival: float | None) -> bool:
        """Whether the next weight gradient goes before the action."""
        if arrival is None or self._kept + self._costs.growth(action) > self._limit:
            return True
        end = self.now + self._costs.of(self._deferred[0])
        return arrival > self.now and end <= max(arrival, self._target - self._rest[action])

    def run(self, action: Action, clock: Clock) -> None:
        """Do it."""
        start = max(self.now, clock.arrival(action) or 0.0)
        self.now = clock.run(action, start)
        self._kept += self._costs.growth(action)
        self.order.append(action)
        if action.op is Op.WEIGHT_GRADIENT:
            self._deferred.popleft()
            return
        self._planned.popleft()
        if action.op is Op.INPUT_GRADIENT:
            weight = Action(action.stage, Op.WEIGHT_GRADIENT, action.micro_batch)
            self._deferred.append(weight)
