"""From a plan to a program: write the messages between ranks into it. No torch import."""

from __future__ import annotations

from bisect import bisect, bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from heapq import merge
from itertools import chain
from math import inf

from megalite.pipeline.actions import Action, Order, Plan, Program
from megalite.pipeline.channels import counterpart, received_for, received_from
from megalite.pipeline.costs import Costs
from megalite.pipeline.timing import end_times


def lower(plan: Plan, costs: Costs | None = None) -> Program:
    """Start each message, at both of its ends, at one time: when it is made, or somewhat later.

    A message whose content is made while its receiver computes would wait beside that computation
    if it was started before it. Started after it, it waits on the sender, beside what that computes
    by then, and may come late. Where waiting takes of a rank's speed, as on a GPU, the time is
    taken that costs the least.

    The times, as they are if no message waits for another, put all actions and messages of all
    ranks into one order, and each rank keeps to it. So whatever comes first in it of what has not
    happened yet can happen, and no rank waits for ever, even where each has to wait for its
    messages before it can compute: as a GPU does to load a kernel or to free memory, or where it
    has one queue for both.

    Args:
        plan: whole.
        costs: times that the order follows from; None: every action takes one unit. All ranks have
            to give the same.

    Raises:
        PlanError: the plan would hang.
    """
    costs = costs or Costs.uniform(plan.num_stages)
    ends = end_times(plan, costs)
    # What ends at the same time is told apart by an order that is the same on all ranks, too.
    moments = {action: (end, number) for number, (action, end) in enumerate(ends.items())}
    ranks = [_Rank(order, moments, costs) for order in plan.ranks]
    starts: list[dict[Action, _Start]] = [{} for _ in ranks]
    for message in _messages(plan, moments):
        sender, receiver = (plan.stage_rank[end.stage] for end in (message.sent, message.received))
        start = _best_moment(message, ranks[sender], ranks[receiver], costs), message.made
        starts[sender][message.sent] = starts[receiver][message.received] = start
    return Program(plan, tuple(map(_with_messages, ranks, starts)))


_Moment = tuple[float, int]
"""When an action ends, and its number among those that end at the same time."""
_Start = tuple[_Moment, _Moment]
"""After which action a message is started, and which one made it: no two have both the same."""


@dataclass(frozen=True)
class _Message:
    """Its two ends, and when the actions end that make it and take it."""

    sent: Action
    received: Action
    made: _Moment
    used: _Moment


class _Rank:
    """When a rank's computations begin and end."""

    def __init__(self, order: Order, moments: Mapping[Action, _Moment], costs: Costs):
        self.order = order
        self.ends = [moments[action] for action in order]
        self.begins = [moments[action][0] - costs.of(action) for action in order]

    def index(self, moment: _Moment) -> int:
        """Of the first computation that ends after a moment."""
        return bisect(self.ends, moment)

    def at(self, moment: _Moment) -> tuple[float, float]:
        """When the rank is free to start what it starts at a moment, and when it computes again."""
        index = self.index(moment)
        free = self.ends[index - 1][0] if index else 0.0
        return free, self.begins[index] if index < len(self.order) else inf


def _best_moment(message: _Message, sender: _Rank, receiver: _Rank, costs: Costs) -> _Moment:
    """The first of those that cost least."""
    use = bisect_left(receiver.ends, message.used)
    needed = receiver.begins[use]
    own = receiver.ends[receiver.index(message.made) : use]
    others = sender.ends[sender.index(message.made) : sender.index(own[-1])] if own else []
    best, least = message.made, inf
    for moment in chain([message.made], merge(own, others)):
        (sent, sender_goes_on), (awaited, receiver_goes_on) = sender.at(moment), receiver.at(moment)
        passes = max(sent, awaited)
        beside = max(0.0, passes - sender_goes_on) + max(0.0, passes - receiver_goes_on)
        cost = costs.beside * beside + max(0.0, passes + costs.message - needed)
        if cost < least:
            best, least = moment, cost
        if not costs.beside * beside or passes + costs.message - needed >= least:
            break  # what is later only comes later
    return best


def _messages(plan: Plan, moments: Mapping[Action, _Moment]) -> Iterator[_Message]:
    """All messages of a plan."""
    made: dict[Action, _Moment] = {}
    for order in plan.ranks:
        for action in order:
            received = received_from(plan, action)
            if received is not None:
                made[received] = moments[action]
    for order in plan.ranks:
        for action in order:
            received = received_for(plan, action)
            source = plan.source(action)
            if received is None or source is None or not plan.is_remote(action.stage, source[0]):
                continue
            yield _Message(counterpart(received), received, made[received], moments[action])


def _with_messages(rank: _Rank, starts: Mapping[Action, _Start]) -> Order:
    """The rank's order with its messages."""
    before: list[list[Action]] = [[] for _ in range(len(rank.order) + 1)]
    for message, (moment, _) in sorted(starts.items(), key=lambda item: item[1]):
        before[bisect(rank.ends, moment)].append(message)
    steps: list[Action] = []
    for started, action in zip(before, rank.order, strict=False):
        steps += [*started, action]
    return (*steps, *before[-1])
