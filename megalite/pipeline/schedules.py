"""Pipeline schedules: pure functions from sizes and costs to a plan. No torch import.

A schedule is added by adding a function and its entry in `SCHEDULES`; the checker, the simulator,
the picture and the executor know plans only.

In the closed forms p is the number of ranks, n of micro-batches, v of chunks; f, i, w are the times
of forward, input and weight gradient on all stages of one rank, b = i + w, and messages take none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from types import MappingProxyType

from megalite.pipeline.actions import Action, Op, Order, Plan
from megalite.pipeline.building_blocks import v_half_order, v_min_order
from megalite.pipeline.costs import Costs
from megalite.pipeline.dualpipe_v import dualpipe_v_order
from megalite.pipeline.placement import looped, v_shaped
from megalite.pipeline.weight_gradients import place_weight_gradients
from megalite.pipeline.zb_v import zb_v_order


@dataclass(frozen=True)
class Schedule:
    """How plans of one name are made.

    Attributes:
        place: from ranks and chunks to the rank of each stage.
        order: from ranks, micro-batches and chunks to each rank's forwards and backwards.
        chunks: how many stages a rank can have: the default, and the most (0: any number).
        keeps: None: backwards are whole. Otherwise they are split, and from the number of ranks
            follows how many micro-batches a rank may keep until their weight gradients are done.
    """

    place: Callable[[int, int], tuple[int, ...]]
    order: Callable[[int, int, int], Sequence[Order]]
    chunks: tuple[int, int]
    keeps: Callable[[int], float] | None = None


def make_plan(
    name: str,
    num_ranks: int,
    num_micro_batches: int,
    *,
    chunks: int = 0,
    costs: Costs | None = None,
    limit: float | None = None,
) -> Plan:
    """The plan of a schedule.

    Args:
        name: in `SCHEDULES`.
        num_ranks: p.
        num_micro_batches: n.
        chunks: v; 0: the schedule's default.
        costs: what weight gradients are placed by; None: every action takes one unit.
        limit: the most that a rank may keep, in the costs' unit of size, where the schedule itself
            would allow more.
    """
    schedule = SCHEDULES[name]
    stage_rank = schedule.place(num_ranks, chunks or schedule.chunks[0])
    order = schedule.order(num_ranks, num_micro_batches, chunks or schedule.chunks[0])
    plan = Plan(name, num_micro_batches, stage_rank, tuple(order))
    if schedule.keeps is None:
        return plan
    costs = costs or Costs.uniform(plan.num_stages)
    # A micro-batch counts until its weight gradients, whichever of its two sizes is larger.
    sizes = map(max, costs.kept, costs.kept_for_weights)
    whole = [0.0] * num_ranks
    for size, rank in zip(sizes, stage_rank, strict=True):
        whole[rank] += size
    bounds = (schedule.keeps(num_ranks) * size for size in whole)
    limits = [bound if limit is None else min(bound, limit) for bound in bounds]
    return place_weight_gradients(plan, costs, limits)


def forward_only(num_micro_batches: int, stage_rank: tuple[int, ...]) -> Plan:
    """Forwards alone, for validation and generation: each rank the furthest that it can.

    If each stage takes one unit, the makespan is n v + p - 1 for looped stages where p divides n or
    v is 1, and 2 n + 2 p - 2 for V-shaped ones.
    """
    orders: list[list[Action]] = [[] for _ in range(max(stage_rank) + 1)]
    ready: list[list[tuple[int, int]]] = [[] for _ in orders]
    ready[stage_rank[0]] = [(0, i) for i in range(num_micro_batches)]
    while any(ready):
        begun = [
            (order, heappop(queue)) for order, queue in zip(orders, ready, strict=True) if queue
        ]
        for order, (furthest, i) in begun:
            stage = -furthest
            order.append(Action(stage, Op.FORWARD, i))
            if stage + 1 < len(stage_rank):
                heappush(ready[stage_rank[stage + 1]], (-stage - 1, i))
    ranks = tuple(map(tuple, orders))
    return Plan("forward", num_micro_batches, stage_rank, ranks, has_backward=False)


def gpipe_order(num_ranks: int, num_micro_batches: int, chunks: int) -> list[Order]:
    """All forwards, then all backwards, one chunk after the other.

    Makespan n (f + b) + (p - 1) (f + b) / v if v is 1 or n >= p, and (v - 1) (p - n) (f + b) / v
    more otherwise; all n micro-batches are alive on each rank. Source: Huang et al., "GPipe",
    arXiv:1811.06965; with chunks, Lamy-Poirier, "Breadth-first pipeline parallelism",
    arXiv:2211.05953.
    """
    micro_batches = range(num_micro_batches)
    return [
        (
            *(
                Action(c * num_ranks + r, Op.FORWARD, i)
                for c in range(chunks)
                for i in micro_batches
            ),
            *(
                Action(c * num_ranks + r, Op.BACKWARD, i)
                for c in reversed(range(chunks))
                for i in micro_batches
            ),
        )
        for r in range(num_ranks)
    ]


def one_f_one_b_order(num_ranks: int, num_micro_batches: int, chunks: int) -> list[Order]:
    """Warm-up forwards, then one forward and one backward in turn, then the backwards left.

    With chunks, micro-batches pass through the ranks in groups, each group once per chunk. There
    are n // p groups of equal size but for one micro-batch, so no group is too small to keep all
    ranks busy, whatever n is.

    Makespan as of `gpipe_order`. At most p - rank micro-batches are alive on a rank, with chunks
    (v - 1) g + 2 (p - rank) - 1 on one of its stages, where g is the size of the largest group.
    Source: Narayanan et al., "PipeDream-2BW", arXiv:2006.09503, with a flush after each step; with
    chunks "Efficient large-scale language model training", arXiv:2104.04473, where p has to divide
    n.
    """
    groups = _even_groups(num_micro_batches, max(1, num_micro_batches // num_ranks))
    places = [(chunk, i) for group in groups for chunk in range(chunks) for i in group]
    orders = []
    for rank in range(num_ranks):
        ahead = num_ranks - rank - 1
        if chunks > 1:
            ahead = 2 * ahead + (chunks - 1) * len(groups[0])
        last = chunks - 1
        forwards = [Action(c * num_ranks + rank, Op.FORWARD, i) for c, i in places]
        backwards = [Action((last - c) * num_ranks + rank, Op.BACKWARD, i) for c, i in places]
        orders.append(tuple(_in_turn(forwards, backwards, ahead)))
    return orders


def zb_h1_order(num_ranks: int, num_micro_batches: int, chunks: int) -> list[Order]:
    """1F1B with backwards split: weight gradients fill the wait for the first backwards.

    Makespan n (f + b) + (p - 1) max(f, i, f + i - w) if n >= p; at most p micro-batches are kept
    until their weight gradients. Source: Qi et al., "Zero Bubble Pipeline
    Parallelism", arXiv:2401.10241.
    """
    return _split(one_f_one_b_order(num_ranks, num_micro_batches, chunks))


def zb_h2_order(num_ranks: int, num_micro_batches: int, _: int) -> list[Order]:
    """As ZB-H1 with twice as many forwards ahead, so that no rank waits once it has begun.

    Makespan n (f + b) + (p - 1) max(f, i - f, f + i - 2 w) if n >= 2 p - 1. If that is (p - 1) f,
    what is left is the time until the first micro-batch reaches the last rank. With equal f, i, w
    it is that of ZB-H1 too, which waits as long, but in the middle: ZB-H2 gains only where a step
    may begin before all ranks have ended the one before. At most 2 p - 1 micro-batches are kept
    until their weight gradients. Source: as `zb_h1_order`.
    """
    orders = []
    for rank in range(num_ranks):
        forwards = [Action(rank, Op.FORWARD, i) for i in range(num_micro_batches)]
        backwards = [Action(rank, Op.INPUT_GRADIENT, i) for i in range(num_micro_batches)]
        orders.append(tuple(_in_turn(forwards, backwards, 2 * (num_ranks - rank - 1))))
    return orders


def _even_groups(num_micro_batches: int, count: int) -> list[range]:
    """The micro-batches in order, in groups whose sizes differ by one at most, larger first."""
    size, larger = divmod(num_micro_batches, count)
    groups, first = [], 0
    for number in range(count):
        stop = first + size + (number < larger)
        groups.append(range(first, stop))
        first = stop
    return groups


def _in_turn(
    forwards: Sequence[Action], backwards: Sequence[Action], ahead: int
) -> Iterator[Action]:
    """Some forwards ahead, then a forward and a backward in turn, then the backwards left."""
    yield from forwards[:ahead]
    steady = forwards[ahead:]
    for forward, backward in zip(steady, backwards, strict=False):
        yield forward
        yield backward
    yield from backwards[len(steady) :]


def _split(orders: Sequence[Order]) -> list[Order]:
    """The same with input gradients in place of whole backwards."""
    return [
        tuple(
            Action(a.stage, Op.INPUT_GRADIENT, a.micro_batch) if a.op is Op.BACKWARD else a
            for a in order
        )
        for order in orders
    ]


def _v(num_ranks: int, _: int) -> tuple[int, ...]:
    return v_shaped(num_ranks)


SCHEDULES: Mapping[str, Schedule] = MappingProxyType(
    {
        "gpipe": Schedule(looped, gpipe_order, (1, 0)),
        "1f1b": Schedule(looped, one_f_one_b_order, (1, 0)),
        "interleaved": Schedule(looped, one_f_one_b_order, (2, 0)),
        "zb-h1": Schedule(looped, zb_h1_order, (1, 1), lambda p: p),
        "zb-h2": Schedule(looped, zb_h2_order, (1, 1), lambda p: 2 * p - 1),
        "zb-v": Schedule(_v, zb_v_order, (2, 2), lambda p: p),
        "v-half": Schedule(_v, v_half_order, (2, 2), lambda p: (p + 2) // 2),
        "v-min": Schedule(_v, v_min_order, (2, 2), lambda p: (p + 4) // 3),
        "dualpipe-v": Schedule(_v, dualpipe_v_order, (2, 2), lambda p: p + 0.5),
    }
)
"""Training schedules by the name that `--schedule` takes."""
