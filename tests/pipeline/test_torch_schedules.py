"""No plan is slower than PyTorch's of the same name: `torch.distributed.pipelining` as the oracle.

Its schedules list each rank's actions too. They are private there, so a PyTorch without them skips
these tests. Both plans are timed by `end_times`; weight gradients of ours are placed for the costs
at hand, while PyTorch's stand where they stand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from closed_forms import planned, sizes

from megalite.pipeline.actions import Action, Op, Plan
from megalite.pipeline.check import check_plan
from megalite.pipeline.schedules import SCHEDULES
from megalite.pipeline.timing import makespan

theirs = pytest.importorskip("torch.distributed.pipelining.schedules")

OPS: Mapping[str, Op] = MappingProxyType(
    {
        "FORWARD": Op.FORWARD,
        "FULL_BACKWARD": Op.BACKWARD,
        "BACKWARD_INPUT": Op.INPUT_GRADIENT,
        "BACKWARD_WEIGHT": Op.WEIGHT_GRADIENT,
    }
)
TIMES = ((1.0, 1.0, 1.0), (1.0, 1.1, 0.9), (1.0, 1.3, 0.4))
PAIRS = [
    ("ScheduleGPipe", "gpipe", 1),
    ("Schedule1F1B", "1f1b", 1),
    ("ScheduleLoopedBFS", "gpipe", 2),
    ("ScheduleLoopedBFS", "gpipe", 3),
    # With one chunk PyTorch's runs twice as many forwards ahead as 1F1B, in twice the memory.
    *(("ScheduleInterleaved1F1B", "interleaved", chunks) for chunks in (2, 3, 4)),
    ("ScheduleInterleavedZeroBubble", "zb-h1", 1),
    ("ScheduleZBVZeroBubble", "zb-v", 2),
    ("ScheduleDualPipeV", "dualpipe-v", 2),
]


def computations(cells: Iterable[Any]) -> Iterator[Action]:
    """Their actions as ours: empty cells and others' left out, overlapped ones in order."""
    for cell in cells:
        if cell is None:
            continue
        if getattr(cell, "sub_actions", None):
            yield from computations(cell.sub_actions)
        elif cell.computation_type.name in OPS:
            op = OPS[cell.computation_type.name]
            yield Action(cell.stage_index, op, cell.microbatch_index)


def their_orders(schedule: str, p: int, n: int, chunks: int) -> list[list[Action]]:
    """Each rank's actions, without building stages: their orders read a few numbers alone."""
    rounds = max(1, n // p)
    numbers = SimpleNamespace(
        pp_group_size=p,
        num_stages=p * chunks,
        _num_stages=p * chunks,
        _stages=[None] * chunks,
        n_local_stages=chunks,
        _n_microbatches=n,
        number_of_rounds=rounds,
        microbatches_per_round=n // rounds,
    )
    kind = getattr(theirs, schedule, None)
    of_rank = getattr(kind, "_calculate_single_rank_operations", None)
    of_all = getattr(kind, "_get_pipeline_order", None)
    if of_rank is not None:
        cells = [of_rank(numbers, rank) for rank in range(p)]
    elif of_all is not None:
        by_rank = of_all(numbers)
        cells = [by_rank[rank] for rank in range(p)]
    else:
        pytest.skip(f"this PyTorch does not list the actions of {schedule}")
    return [list(computations(row)) for row in cells]


def their_plan(schedule: str, p: int, n: int, chunks: int) -> Plan:
    orders = their_orders(schedule, p, n, chunks)
    if schedule == "Schedule1F1B":
        # Its listing, which nothing runs, numbers the last rank's forwards from 1 on.
        forwards = iter(range(n))
        orders[-1] = [
            Action(a.stage, a.op, next(forwards)) if a.op is Op.FORWARD else a for a in orders[-1]
        ]
    # Of a step with few micro-batches some list more than there are.
    kept = tuple(tuple(a for a in order if a.micro_batch < n) for order in orders)
    ours = next(name for theirs, name, _ in PAIRS if theirs == schedule)
    plan = Plan(schedule, n, SCHEDULES[ours].place(p, chunks), kept)
    check_plan(plan)
    return plan


def exists(schedule: str, p: int, n: int) -> bool:
    """Whether PyTorch has the schedule in that size."""
    if schedule == "ScheduleDualPipeV":
        return n >= 2 * p
    return not schedule.startswith("ScheduleInterleaved") or n % max(1, n // p) == 0


def compare(schedule: str, name: str, chunks: int, p: int, n: int) -> None:
    theirs = their_plan(schedule, p, n, chunks)
    for times in TIMES:
        for message in (0.0, 0.1):
            plan, costs = planned(name, p, n, chunks, times, message)
            ours, other = makespan(plan, costs), makespan(theirs, costs)
            assert ours <= other + 1e-9, f"{schedule} p {p} n {n} {times}: {ours} against {other}"


@pytest.mark.parametrize(("schedule", "name", "chunks"), PAIRS)
def test_no_plan_is_slower(schedule: str, name: str, chunks: int) -> None:
    for p in (1, 2, 3, 4, 6):
        for n in sizes(p):
            if exists(schedule, p, n):
                compare(schedule, name, chunks, p, n)


@pytest.mark.full
@pytest.mark.parametrize("p", range(1, 17))
@pytest.mark.parametrize(("schedule", "name", "chunks"), PAIRS)
def test_no_plan_of_any_size_is_slower(schedule: str, name: str, chunks: int, p: int) -> None:
    numbers = range(1, 4 * p + 2) if p <= 8 else sizes(p)
    for n in numbers:
        if exists(schedule, p, n):
            compare(schedule, name, chunks, p, n)


def test_the_same_where_backwards_are_whole() -> None:
    """Not only as fast: GPipe and 1F1B are the same lists, interleaved where p divides n."""
    for schedule, name, chunks in PAIRS:
        if name in ("1f1b", "interleaved") or (name, chunks) == ("gpipe", 1):
            for p, n in ((2, 4), (4, 8), (4, 12)):
                plan, _ = planned(name, p, n, chunks, TIMES[0])
                if schedule != "ScheduleLoopedBFS":
                    assert their_plan(schedule, p, n, chunks).ranks == plan.ranks
