"""From a plan to a program: write the messages between ranks into it. No torch import."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from megalite.pipeline.actions import (
    GIVES_INPUT_GRADIENT,
    SENDS,
    Action,
    Op,
    Order,
    Plan,
    Program,
)
from megalite.pipeline.channels import counterpart, goes_later, received_from
from megalite.pipeline.costs import Costs
from megalite.pipeline.timing import end_times


def lower(plan: Plan, costs: Costs | None = None) -> Program:
    """Send right after an action made its output; begin to receive while that action runs.

    So a message travels while its receiver computes, and does not stand in the way of others: one
    that its receiver took only when needed would hold up all that its sender starts after it. It
    is received no later than one action ahead of its use, unless its receiver has yet to make what
    it sends before it.

    Messages of one channel are started, at both
    of their ends, in the order in which they would be made if no message waited for another. That
    order is the same everywhere and no message in it waits for a later one, so no rank can wait for
    itself, however strictly a back end keeps its messages in order.

    Args:
        plan: whole.
        costs: times that the order of messages follows from; None: every action takes one unit.
            All ranks have to give the same.

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
    before: list[list[Action]] = [[] for _ in range(len(order) + 1)]
    messages = sorted(_messages(plan, order, made), key=lambda message: message.made)
    for later in (True, False):
        channel = [m for m in messages if goes_later(plan, m.action) is later]
        for message, place in zip(channel, _places(channel), strict=True):
            before[place].append(message.action)
    steps: list[Action] = []
    for started, action in zip(before, order, strict=False):
        steps += [*started, action]
    return (*steps, *before[-1])


@dataclass(frozen=True)
class _Message:
    """A message, and the index of the action before which it is started.

    Attributes:
        action: as its end on this rank names it.
        made: when its content is.
        place: where it is started; a receive may be started earlier too.
    """

    action: Action
    made: Made
    place: int


def _messages(plan: Plan, order: Order, made: Mapping[Action, Made]) -> Iterator[_Message]:
    """What the rank receives and sends."""
    own = [made[action] for action in order]
    for index, action in enumerate(order):
        stage, i = action.stage, action.micro_batch
        source = plan.source(action)
        if source is not None and plan.is_remote(stage, source[0]):
            neighbour, direction = source
            content = _made(made, neighbour, direction, i)
            meanwhile = bisect_left(own, content[:1])
            place = min(meanwhile, max(0, index - 1))
            yield _Message(Action(stage, Op(f"RECV_{direction}"), i), content, place)
        received = received_from(plan, action)
        if received is not None and plan.is_remote(stage, received.stage):
            yield _Message(counterpart(received), made[action], index + 1)


def _made(made: Mapping[Action, Made], stage: int, direction: Op, micro_batch: int) -> Made:
    """When a stage's result is made, by whichever action makes it."""
    makers = (Op.FORWARD,) if direction is Op.FORWARD else GIVES_INPUT_GRADIENT
    actions = (Action(stage, op, micro_batch) for op in makers)
    return next(made[action] for action in actions if action in made)


def _places(channel: Sequence[_Message]) -> list[int]:
    """Where each message is started: in the channel's order, receives as early as those after."""
    places = [message.place for message in channel]
    for index in reversed(range(len(channel) - 1)):
        if channel[index].action.op not in SENDS:
            places[index] = min(places[index], places[index + 1])
    return list(accumulate(places, max))
