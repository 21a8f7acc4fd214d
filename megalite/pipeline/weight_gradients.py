"""Where the weight gradients of split backwards go: into the waits of a plan. No torch import."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from megalite.pipeline.actions import Action, Op, Order, Plan, PlanError
from megalite.pipeline.costs import Costs
from megalite.pipeline.timing import Clock, makespan

PATIENCE = (0.0, 0.5, 1.0)
"""Waits shorter than so many weight gradients are left empty; the best of these is taken."""


def place_weight_gradients(plan: Plan, costs: Costs, limits: Sequence[float]) -> Plan:
    """Add a weight gradient for each input gradient of a plan.

    Weight gradients have no one waiting for them, so they run while a rank waits for a message, or
    when what they keep is needed for the next forward, or at the end. Orders of the other actions
    stay as they are.

    Source: the greedy scheduler of Qi et al., "Zero Bubble Pipeline Parallelism", arXiv:2401.10241,
    section 3.1: simulated with measured costs under a limit of memory, the best of several
    settings.

    Args:
        plan: forwards and input gradients.
        costs: their times and sizes.
        limits: the most that each rank shall keep, in the unit of sizes; a rank keeps more only if
            its order of forwards and input gradients alone does.
    """
    plans = [_place(plan, costs, limits, patience) for patience in PATIENCE]
    return min(plans, key=lambda placed: makespan(placed, costs))


def _place(plan: Plan, costs: Costs, limits: Sequence[float], patience: float) -> Plan:
    clock = Clock(plan, costs)
    ranks = [_Rank(order, costs, limit) for order, limit in zip(plan.ranks, limits, strict=True)]
    unfinished = set(range(plan.num_ranks))
    blocked: set[int] = set()
    while unfinished:
        ready = unfinished - blocked
        if not ready:
            waiting = ", ".join(f"rank {i} in {ranks[i].next()}" for i in sorted(unfinished))
            raise PlanError(f"plan {plan.name} would hang: {waiting}")
        # The rank that is furthest behind: whatever another one does now ends later than its clock.
        number = min(ready, key=lambda i: (ranks[i].now, i))
        rank = ranks[number]
        action = rank.choose(clock, patience)
        if action is None:
            blocked.add(number)
            continue
        rank.run(action, clock)
        if rank.is_done():
            unfinished.discard(number)
        neighbours = (action.stage - 1, (action.stage + 1) % plan.num_stages)
        blocked.difference_update(plan.stage_rank[stage] for stage in neighbours)
    return replace(plan, ranks=tuple(tuple(rank.order) for rank in ranks))


class _Rank:
    """One rank's way through its order."""

    def __init__(self, planned: Order, costs: Costs, limit: float):
        self._planned, self._costs, self._limit = deque(planned), costs, limit
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

    def choose(self, clock: Clock, patience: float) -> Action | None:
        """What to do now; None: to wait for what no other rank has begun yet."""
        if not self._planned:
            return self._deferred[0]
        action = self.next()
        arrival = clock.arrival(action)
        if self._deferred:
            weight = self._deferred[0]
            spare = patience * self._costs.of(weight)
            waits = arrival is None or arrival - self.now > spare
            too_much = self._kept + self._costs.growth(action) > self._limit
            if waits or too_much:
                return weight
        return None if arrival is None else action

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
