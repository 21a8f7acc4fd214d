"""When each action of a plan would run if messages never stood in each other's way. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from megalite.pipeline.actions import GIVES_INPUT_GRADIENT, Action, Op, Plan, PlanError
from megalite.pipeline.costs import Costs


class Clock:
    """Ends of actions as they become known, and when their results can be used.

    Args:
        plan: of which only the placement of stages matters.
        costs: of its actions.
    """

    def __init__(self, plan: Plan, costs: Costs):
        self.plan, self.costs = plan, costs
        self.ends: dict[Action, float] = {}
        # By direction and stage, then micro-batch.
        self._results: list[dict[int, float]] = [{} for _ in range(2 * plan.num_stages)]

    def arrival(self, action: Action) -> float | None:
        """When the action's input is there; None if that is not known yet."""
        source = self.plan.source(action)
        if source is None:
            return 0.0
        stage, direction = source
        made = self._of(stage, direction).get(action.micro_batch)
        if made is None:
            return None
        return made + (self.costs.message if self.plan.is_remote(stage, action.stage) else 0.0)

    def run(self, action: Action, start: float) -> float:
        """The action runs now; returns its end."""
        end = self.ends[action] = start + self.costs.of(action)
        if action.op is Op.FORWARD:
            self._of(action.stage, Op.FORWARD)[action.micro_batch] = end
        elif action.op in GIVES_INPUT_GRADIENT:
            self._of(action.stage, Op.BACKWARD)[action.micro_batch] = end
        return end

    def _of(self, stage: int, direction: Op) -> dict[int, float]:
        return self._results[2 * stage + (direction is Op.FORWARD)]


def end_times(plan: Plan, costs: Costs) -> Mapping[Action, float]:
    """End of each action if every one starts as soon as its rank and its input allow.

    Returns:
        Actions come in an order in which each stands after what it needs.

    Raises:
        PlanError: some never start; the ranks are named, and the action that each waits in.
    """
    clock = Clock(plan, costs)
    now = [0.0] * plan.num_ranks
    position = [0] * plan.num_ranks
    progress = True
    while progress:
        progress = False
        for rank, order in enumerate(plan.ranks):
            while position[rank] < len(order):
                action = order[position[rank]]
                arrival = clock.arrival(action)
                if arrival is None:
                    break
                now[rank] = clock.run(action, max(now[rank], arrival))
                position[rank] += 1
                progress = True
    waiting = [
        f"rank {rank} in {order[at]}"
        for rank, (order, at) in enumerate(zip(plan.ranks, position, strict=True))
        if at < len(order)
    ]
    if waiting:
        raise PlanError(f"plan {plan.name} would hang: {', '.join(waiting)}")
    return clock.ends


def makespan(plan: Plan, costs: Costs) -> float:
    """End of the plan's last action."""
    return max(end_times(plan, costs).values())
