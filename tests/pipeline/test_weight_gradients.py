"""Weight gradients fill the waits: within the limit of memory, and nearly as well as any placement.

The best placement is found by trying them all, which is possible for a few micro-batches.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from time import perf_counter

import pytest

from megalite.pipeline.actions import Action, Op, Order, Plan, PlanError
from megalite.pipeline.check import check_plan
from megalite.pipeline.costs import Costs
from megalite.pipeline.schedules import SCHEDULES, make_plan
from megalite.pipeline.timing import makespan
from megalite.pipeline.weight_gradients import place_weight_gradients

SPLIT = [name for name, schedule in SCHEDULES.items() if schedule.keeps is not None]


def without_weights(name: str, ranks: int, micro_batches: int) -> tuple[Plan, list[float]]:
    """Forwards and input gradients of a schedule, and what its ranks may keep, in stages."""
    schedule = SCHEDULES[name]
    assert schedule.keeps is not None
    chunks = schedule.chunks[0]
    orders = tuple(schedule.order(ranks, micro_batches, chunks))
    plan = Plan(name, micro_batches, schedule.place(ranks, chunks), orders)
    return plan, [schedule.keeps(ranks) * chunks] * ranks


def random_costs(stages: int, seed: int) -> Costs:
    """Stages of like but unequal times, the last one heavier, as the head and the loss make it."""
    chance = random.Random(seed)
    forward = [chance.uniform(0.9, 1.1) for _ in range(stages)]
    forward[-1] *= 1.3
    weight_share = chance.choice([0.3, 0.7, 1.0])
    inputs = tuple(time * chance.uniform(1.0, 1.3) for time in forward)
    weights = tuple(time * weight_share * chance.uniform(0.9, 1.1) for time in forward)
    return replace(
        Costs.uniform(stages, message=chance.choice([0.0, 0.1])),
        forward=tuple(forward),
        input_gradient=inputs,
        weight_gradient=weights,
    )


def placements(order: Order, costs: Costs, limit: float) -> Iterator[Order]:
    """Every order of one rank with its weight gradients, oldest first, that keeps the limit.

    If the given order alone exceeds the limit, no placement does better than one that leaves no
    weight gradient waiting; then those are kept that exceed it no further.
    """
    found = list(_placements(order, (), ()))
    least = min(costs.peak(placed) for placed in found)
    return (placed for placed in found if costs.peak(placed) <= max(limit, least))


def _placements(order: Order, waiting: Order, placed: Order) -> Iterator[Order]:
    if waiting:
        yield from _placements(order, waiting[1:], (*placed, waiting[0]))
    if order:
        action = order[0]
        weight = Action(action.stage, Op.WEIGHT_GRADIENT, action.micro_batch)
        more = (weight,) if action.op is Op.INPUT_GRADIENT else ()
        yield from _placements(order[1:], (*waiting, *more), (*placed, action))
    elif not waiting:
        yield placed


def best_makespan(plan: Plan, costs: Costs, limits: list[float]) -> float:
    """The shortest step of all placements."""
    choices = [placements(o, costs, limit) for o, limit in zip(plan.ranks, limits, strict=True)]
    return min(makespan(replace(plan, ranks=ranks), costs) for ranks in product(*choices))


def gaps(cases: list[tuple[str, int, int]], seeds: range) -> list[float]:
    """By how much each placed plan is longer than the best one, as a share."""
    found = []
    for name, ranks, micro_batches in cases:
        plan, limits = without_weights(name, ranks, micro_batches)
        for seed in seeds:
            costs = random_costs(plan.num_stages, seed)
            placed = place_weight_gradients(plan, costs, limits)
            found.append(makespan(placed, costs) / best_makespan(plan, costs, limits) - 1.0)
    return found


def assert_best(found: list[float]) -> None:
    assert min(found) >= -1e-12, "better than the best: the search is wrong"
    assert max(found) < 1e-3


def test_placements_are_the_best_for_a_few_micro_batches() -> None:
    cases = [("zb-h1", 2, 4), ("zb-h2", 2, 3), ("zb-h1", 3, 3), ("zb-v", 2, 2), ("v-half", 2, 2)]
    assert_best(gaps(cases, range(6)))


@pytest.mark.full
def test_placements_are_the_best_for_some_more() -> None:
    cases = [
        *((name, 2, n) for name in ("zb-h1", "zb-h2") for n in (2, 3, 4)),
        *((name, 3, n) for name in ("zb-h1", "zb-h2") for n in (2, 3)),
        *((name, 2, 2) for name in ("zb-v", "v-half", "v-min", "dualpipe-v")),
    ]
    assert_best(gaps(cases, range(20)))


@pytest.mark.parametrize("name", SPLIT)
def test_a_tighter_limit_is_kept_too(name: str) -> None:
    plan, limits = without_weights(name, 4, 8)
    costs = random_costs(plan.num_stages, seed=7)
    lengths = []
    for limit in (limits[0], limits[0] - 1, 1.0):
        placed = place_weight_gradients(plan, costs, [limit] * 4)
        check_plan(placed)
        for order, given in zip(placed.ranks, plan.ranks, strict=True):
            assert tuple(a for a in order if a.op is not Op.WEIGHT_GRADIENT) == given
            # Without weight gradients waiting, the order keeps so much.
            alone = costs.peak(at_once(given))
            assert costs.peak(order) <= max(limit, alone)
        lengths.append(makespan(placed, costs))
    assert lengths[0] <= lengths[-1], "less memory, and faster"


def at_once(order: Order) -> Order:
    """Each weight gradient right after its input gradient."""
    return tuple(
        part
        for a in order
        for part in (
            (a, Action(a.stage, Op.WEIGHT_GRADIENT, a.micro_batch))
            if a.op is Op.INPUT_GRADIENT
            else (a,)
        )
    )


def test_sizes_in_bytes_bind() -> None:
    """What is left for the weight gradients alone is less than what a forward keeps."""
    costs = replace(Costs.uniform(4), kept=(100.0,) * 4, kept_for_weights=(60.0,) * 4)
    generous = make_plan("zb-h1", 4, 12, costs=costs)
    tight = make_plan("zb-h1", 4, 12, costs=costs, limit=400.0)
    assert max(map(costs.peak, generous.ranks)) <= 400.0, "p micro-batches, the schedule's own"
    assert max(map(costs.peak, tight.ranks)) <= 400.0
    tighter = make_plan("zb-h2", 4, 12, costs=costs, limit=460.0)
    wide = make_plan("zb-h2", 4, 12, costs=costs)
    assert costs.peak(wide.ranks[3]) > 460.0 >= costs.peak(tighter.ranks[3])


def test_a_plan_that_would_hang_is_refused() -> None:
    ranks = (
        tuple(map(Action.parse, ["0F0", "0I0", "0F1", "0I1"])),
        tuple(map(Action.parse, ["1F0", "1F1", "1I0", "1I1"])),
    )
    with pytest.raises(PlanError, match=r"plan mine would hang: rank 0 in 0I0, rank 1 in 1F1"):
        place_weight_gradients(Plan("mine", 2, (0, 1), ranks), Costs.uniform(2), [9.0, 9.0])


@pytest.mark.full
def test_a_large_pipeline_is_planned_in_seconds() -> None:
    begin = perf_counter()
    plan = make_plan("zb-v", 64, 256, costs=random_costs(128, seed=1))
    assert perf_counter() - begin < 60.0, "seconds, on a machine with other work"
    check_plan(plan)
