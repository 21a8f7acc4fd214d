"""What a schedule has to take and to keep, by closed forms; and plans made for given times.

p is the number of ranks, n of micro-batches, v of chunks; f, i, w are the times of forward, input
and weight gradient on all stages of a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from megalite.pipeline.actions import Plan
from megalite.pipeline.costs import Costs
from megalite.pipeline.schedules import SCHEDULES, make_plan

Times = tuple[float, float, float]
EQUAL: Times = (1.0, 1.0, 1.0)
UNEQUAL: tuple[Times, ...] = (
    (1.0, 1.1, 0.9),
    (1.0, 1.5, 0.5),
    (1.0, 2.0, 2.0),
    (2.0, 1.0, 2.0),
    (0.5, 2.0, 1.25),
)

Waits = Callable[[int, int, int, float, float, float], float | None]
"""From p, n, v, f, i, w to what a step takes beyond n (f + i + w); None: no closed form."""


def _whole(p: int, n: int, v: int, f: float, i: float, w: float) -> float:
    return ((p - 1) + (v - 1) * max(0, p - n)) * (f + i + w) / v


def _equal(holds: Callable[[int, int], bool], halves: Callable[[int], int]) -> Waits:
    """So many halves of a forward, if all times are equal and n is large enough for p."""
    return lambda p, n, _, f, i, w: halves(p) * f / 2 if f == i == w and holds(p, n) else None


WAITS: Mapping[str, Waits] = MappingProxyType(
    {
        "gpipe": _whole,
        "1f1b": _whole,
        "interleaved": _whole,
        "zb-h1": lambda p, n, _, f, i, w: (p - 1) * max(f, i, f + i - w) if n >= p else None,
        "zb-h2": lambda p, n, _, f, i, w: (
            (p - 1) * max(f, i - f, f + i - 2 * w) if n >= 2 * p - 1 else None
        ),
        "zb-v": _equal(lambda p, n: n >= p, lambda p: p - 1),
        "v-half": _equal(lambda p, n: p >= 3 and 2 * n > p, lambda p: 3 * p - 4),
        "v-min": _equal(lambda p, n: min(p, n) >= 2, lambda p: 4 * p - (5 if p % 3 else 3)),
        "dualpipe-v": _equal(lambda p, n: n >= p, lambda p: p - 1),
    }
)

ALIVE: Mapping[str, Callable[[int, int, int, int], float]] = MappingProxyType(
    {
        "gpipe": lambda _p, n, _v, _rank: n,
        "1f1b": lambda p, n, _v, rank: min(n, p - rank),
        "interleaved": lambda p, n, v, rank: (
            min(n * v, (v - 1) * largest_group(n, p) + 2 * (p - rank) - 1) / v
            if v > 1
            else min(n, p - rank)
        ),
        "zb-h1": lambda p, _n, _v, _rank: p,
        "zb-h2": lambda p, _n, _v, _rank: 2 * p - 1,
        "zb-v": lambda p, _n, _v, _rank: p,
        "v-half": lambda p, _n, _v, _rank: (p + 2) // 2,
        "v-min": lambda p, _n, _v, _rank: (p + 4) // 3,
        "dualpipe-v": lambda p, _n, _v, _rank: p + 0.5,
    }
)
"""From p, n, v and the rank to the most micro-batches alive on it. Exact where backwards are whole;
elsewhere a bound for all ranks."""


def largest_group(n: int, p: int) -> int:
    """Micro-batches of an interleaved schedule's first group."""
    return -(-n // max(1, n // p))


def spread(plan: Plan, times: Times, message: float = 0.0) -> Costs:
    """Costs of a plan whose ranks take so long for a micro-batch, all stages together."""
    chunks = plan.num_stages // plan.num_ranks
    forward, inputs, weights = (time / chunks for time in times)
    return Costs.uniform(
        plan.num_stages,
        forward=forward,
        input_gradient=inputs,
        weight_gradient=weights,
        message=message,
    )


def planned(
    name: str, p: int, n: int, chunks: int, times: Times, message: float = 0.0
) -> tuple[Plan, Costs]:
    """The plan for these times, and its costs."""
    v = chunks or SCHEDULES[name].chunks[0]
    costs = spread(Plan(name, n, SCHEDULES[name].place(p, v), ((),) * p), times, message)
    return make_plan(name, p, n, chunks=chunks, costs=costs), costs


def sizes(ranks: int) -> Iterator[int]:
    """Numbers of micro-batches at which something changes."""
    wanted = {1, 2, ranks // 2 + 1, ranks - 1, ranks, ranks + 1, 2 * ranks - 1, 2 * ranks}
    return iter(sorted(n for n in wanted | {4 * ranks + 1} if n > 0))
