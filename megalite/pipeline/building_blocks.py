"""V-shaped schedules: one micro-batch's way, repeated. No torch import.

A rank has one stage on the way down (chunk 0) and one on the way back (chunk 1). If every action
takes one unit, a micro-batch needs six units of each rank: two forwards, two input gradients and
two weight gradients. So a *building block*, which says at which time each rank works on the first
micro-batch, is repeated every six units; how long it keeps a stage's activations decides how many
micro-batches are alive, and so the memory. The times give only the order of the actions: whatever
runs it starts each of them as early as its input is there.

Source: Qi et al., "Pipeline Parallelism with Controllable Memory", arXiv:2405.15362.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from megalite.pipeline.actions import Action, Op, Order

INTERVAL = 6
"""Units of time between a micro-batch and the next."""

Block = tuple[tuple[int, Op, int], ...]
"""(stage, operation, time) of one rank's four actions on the first micro-batch."""

Pace = tuple[int, int, int, int]
"""Units from one rank to the next: forwards down and back, input gradients down and back."""


def v_half_order(num_ranks: int, num_micro_batches: int, _: int) -> list[Order]:
    """Half the memory of 1F1B: at most (p + 2) // 2 micro-batches are kept.

    Makespan n (f + b) + (3 p - 4) f / 2 if f, i, w are equal, p >= 3 and n > p / 2.
    """
    return _repeat(num_ranks, num_micro_batches, (1, 2, 1, 2))


def v_min_order(num_ranks: int, num_micro_batches: int, _: int) -> list[Order]:
    """A third of the memory of 1F1B: at most (p + 4) // 3 micro-batches are kept.

    Makespan n (f + b) + (4 p - 5) f / 2, or (4 p - 3) f / 2 if 3 divides p; if f, i, w are equal
    and both p and n are 2 at least. Unequal ones cost time with each micro-batch, since the next
    one has to wait for the memory of this one.
    """
    return _repeat(num_ranks, num_micro_batches, (1, 1, 1, 1))


def _repeat(num_ranks: int, num_micro_batches: int, pace: Pace) -> list[Order]:
    orders = []
    for block in _shortest_blocks(num_ranks, pace):
        timed = [
            (time + INTERVAL * i, Action(stage, op, i))
            for stage, op, time in block
            for i in range(num_micro_batches)
        ]
        orders.append(tuple(action for _, action in sorted(timed, key=lambda item: item[0])))
    return orders


def _shortest_blocks(num_ranks: int, pace: Pace) -> list[Block]:
    """Each rank's block, with the shortest turns by which repetitions never collide."""
    some = range(1, INTERVAL + 1)
    turns = sorted(product(some, some, some), key=lambda turn: (sum(turn), turn))
    for turn in turns:
        blocks = list(_blocks(num_ranks, pace, turn))
        if all(len({time % INTERVAL for _, _, time in block}) == len(block) for block in blocks):
            return blocks
    raise AssertionError(f"no turns fit {num_ranks} ranks at pace {pace}")


def _blocks(num_ranks: int, pace: Pace, turns: tuple[int, int, int]) -> Iterator[Block]:
    """Down, turn, back; turn; down, turn, back: the last forward turns into the first backward."""
    far = num_ranks - 1
    back_begins = far * pace[0] + turns[0]
    gradients_begin = back_begins + far * pace[1] + turns[1]
    gradients_back_begin = gradients_begin + far * pace[2] + turns[2]
    for rank in range(num_ranks):
        down, back = rank, 2 * num_ranks - 1 - rank
        yield (
            (down, Op.FORWARD, rank * pace[0]),
            (back, Op.FORWARD, back_begins + (far - rank) * pace[1]),
            (back, Op.INPUT_GRADIENT, gradients_begin + rank * pace[2]),
            (down, Op.INPUT_GRADIENT, gradients_back_begin + (far - rank) * pace[3]),
        )
