"""Pipeline schedules: pure functions from sizes to a plan. No torch import.

A schedule is added by adding a function and its entry in `SCHEDULES`; the checker, the simulator,
the picture and the executor know plans only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from megalite.pipeline.actions import Action, Op, Plan


def gpipe(num_ranks: int, num_micro_batches: int) -> Plan:
    """All forwards, then all backwards.

    Makespan (n + p - 1) (f + b); all n micro-batches are alive on each rank.
    Source: Huang et al., "GPipe", arXiv:1811.06965.
    """
    ranks = []
    for rank in range(num_ranks):
        order = [Action(rank, Op.FORWARD, i) for i in range(num_micro_batches)]
        order += [Action(rank, Op.BACKWARD, i) for i in range(num_micro_batches)]
        ranks.append(tuple(order))
    return Plan("gpipe", num_micro_batches, tuple(range(num_ranks)), tuple(ranks))


def one_f_one_b(num_ranks: int, num_micro_batches: int) -> Plan:
    """Warm-up forwards, then one forward and one backward in turn, then the backwards left.

    Makespan (n + p - 1) (f + b); at most p - rank micro-batches are alive on a rank.
    Source: Narayanan et al., "PipeDream-2BW", arXiv:2006.09503, with a flush after each step.
    """
    ranks = []
    for rank in range(num_ranks):
        warm_up = min(num_ranks - rank - 1, num_micro_batches)
        order = [Action(rank, Op.FORWARD, i) for i in range(warm_up)]
        for i in range(num_micro_batches - warm_up):
            order.append(Action(rank, Op.FORWARD, warm_up + i))
            order.append(Action(rank, Op.BACKWARD, i))
        left_over = range(num_micro_batches - warm_up, num_micro_batches)
        order += [Action(rank, Op.BACKWARD, i) for i in left_over]
        ranks.append(tuple(order))
    return Plan("1f1b", num_micro_batches, tuple(range(num_ranks)), tuple(ranks))


def forward_only(num_ranks: int, num_micro_batches: int) -> Plan:
    """Forwards in order, for validation and generation."""
    ranks = tuple(
        tuple(Action(rank, Op.FORWARD, i) for i in range(num_micro_batches))
        for rank in range(num_ranks)
    )
    return Plan("forward", num_micro_batches, tuple(range(num_ranks)), ranks, has_backward=False)


SCHEDULES: Mapping[str, Callable[[int, int], Plan]] = MappingProxyType(
    {"1f1b": one_f_one_b, "gpipe": gpipe}
)
"""Training schedules by the name that `--schedule` takes."""
