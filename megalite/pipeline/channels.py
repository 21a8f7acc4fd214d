"""Messages between pipeline ranks: their two ends, and the channels they travel on. No torch.

A *channel* is a direction of a rank: toward later ranks or toward earlier ones. Messages of one
channel of a rank, those that it sends that way and those that reach it that way, run one after the
other in the order in which they are started; the two directions do not wait for each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from megalite.parallel.topology import Topology
from megalite.pipeline.actions import (
    GIVES_INPUT_GRADIENT,
    SENDS,
    Action,
    Op,
    Plan,
    Program,
)

# The operation at the other end of a message, and how many stages away that end is.
_COUNTERPART: Mapping[Op, tuple[Op, int]] = MappingProxyType(
    {
        Op.SEND_FORWARD: (Op.RECV_FORWARD, 1),
        Op.RECV_FORWARD: (Op.SEND_FORWARD, -1),
        Op.SEND_BACKWARD: (Op.RECV_BACKWARD, -1),
        Op.RECV_BACKWARD: (Op.SEND_BACKWARD, 1),
    }
)


def is_message(action: Action) -> bool:
    """Whether it sends or receives."""
    return action.op in _COUNTERPART


def counterpart(message: Action) -> Action:
    """The same message as its other end names it."""
    op, step = _COUNTERPART[message.op]
    return Action(message.stage + step, op, message.micro_batch)


def as_received(message: Action) -> Action:
    """The message as its receiver names it."""
    return counterpart(message) if message.op in SENDS else message


def peer_rank(plan: Plan, message: Action) -> int:
    """Pipeline rank at the other end of a message."""
    return plan.stage_rank[message.stage + _COUNTERPART[message.op][1]]


def received_for(plan: Plan, action: Action) -> Action | None:
    """The message that would bring a computation its input, were it made on another rank."""
    source = plan.source(action)
    if source is None:
        return None
    return Action(action.stage, Op(f"RECV_{source[1]}"), action.micro_batch)


def received_from(plan: Plan, action: Action) -> Action | None:
    """The message that would bring a computation's result to who takes it, were that another rank;
    None if nobody takes it."""
    stage, i = action.stage, action.micro_batch
    if action.op is Op.FORWARD and stage < plan.num_stages - 1:
        return Action(stage + 1, Op.RECV_FORWARD, i)
    if action.op in GIVES_INPUT_GRADIENT and stage > 0:
        return Action(stage - 1, Op.RECV_BACKWARD, i)
    return None


def goes_later(plan: Plan, message: Action) -> bool:
    """Which channel: True if the message goes from an earlier rank to a later one."""
    here, there = plan.stage_rank[message.stage], peer_rank(plan, message)
    return (here < there) == (message.op in SENDS)


def message_number(plan: Plan, message: Action) -> int:
    """A number of its own for each message of a plan, the same at both ends."""
    received = as_received(message)
    kind = received.stage * 2 + (received.op is Op.RECV_BACKWARD)
    return kind * plan.num_micro_batches + received.micro_batch


def send_positions(program: Program, topology: Topology) -> dict[tuple[int, str], int]:
    """(world rank, message as its receiver names it) -> index of the step that sends it."""
    found = {}
    for world_rank in range(topology.world_size):
        for index, step in enumerate(program.ranks[topology.coordinates(world_rank).pp]):
            if step.op in SENDS:
                found[world_rank, str(counterpart(step))] = index
    return found
