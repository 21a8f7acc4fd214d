"""From a plan to a program: write the messages between ranks into it. No torch import."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Mapping

from megalite.pipeline.actions import (
    GIVES_INPUT_GRADIENT,
    Action,
    Op,
    Order,
    Plan,
    Program,
)
from megalite.pipeline.channels import counterpart, received_from
from megalite.pipeline.costs import Costs
from megalite.pipeline.timing import end_times


def lower(plan: Plan, costs: Costs | None = None) -> Program:
    """Start each message, at both of its ends, where its content is made.

    That is right after the action that makes it on the rank that sends it, and on the rank that
    receives it before the action during which it is made, so that it travels while that rank
    computes.

    When everything would be made if no message waited for another puts all actions and messages of
    all ranks into one order, and each rank keeps to it. So whatever comes first in it of what has
    not happened yet can happen, and no rank waits for ever, even where each has to wait for its
    messages before it can compute: as a GPU does to load a kernel or to free memory, or where it
    has one queue for both.

    Args:
        plan: whole.
        costs: times that the order follows from; None: every action takes one unit. All ranks have
            to give the same.

    Raises:
        PlanError: the plan would hang.
    """
    ends = end_times(plan, costs or Costs.uniform(plan.num_stages))
    # What ends at the same time is told apart by an order that is the same on all ranks, too.
    made = {action: (end, number) for number, (action, end) in enumerate(ends.items())}
    return Program(plan, tuple(_lower_rank(plan, order, made) for order in plan.ranks))


Made = tuple[float, int]
"""When an action has made its result, and its number among those that end at the same time."""


def _lower_rank(plan: Plan, order: Order, made: Mapping[Action, Made]) -> Order:
    """The rank's order with its messages."""
    own = [made[action] for action in order]
    before: list[list[Action]] = [[] for _ in range(len(order) + 1)]
    for content, message in sorted(_messages(plan, order, made), key=lambda pair: pair[0]):
        before[bisect(own, content)].append(message)
    steps: list[Action] = []
    for started, action in zip(before, order, strict=False):
        steps += [*started, action]
    return (*steps, *before[-1])


def _messages(
    plan: Plan, order: Order, made: Mapping[Action, Made]
) -> Iterator[tuple[Made, Action]]:
    """What the rank receives and sends, and when its content is made."""
    for action in order:
        stage, i = action.stage, action.micro_batch
        source = plan.source(action)
        if source is not None and plan.is_remote(stage, source[0]):
            neighbour, direction = source
            received = Action(stage, Op(f"RECV_{direction}"), i)
            yield _made(made, neighbour, direction, i), received
        taken = received_from(plan, action)
        if taken is not None and plan.is_remote(stage, taken.stage):
            yield made[action], counterpart(taken)


def _made(made: Mapping[Action, Made], stage: int, direction: Op, micro_batch: int) -> Made:
    """When a stage's result is made, by whichever action makes it."""
    makers = (Op.FORWARD,) if direction is Op.FORWARD else GIVES_INPUT_GRADIENT
    actions = (Action(stage, op, micro_batch) for op in makers)
    return next(made[action] for action in actions if action in made)
