"""Every schedule is whole and free of deadlock, as long as its closed form says, and keeps no more
micro-batches alive than its paper says.

In the closed forms p is the number of ranks, n of micro-batches, v of chunks; f, i, w are the times
of forward, input and weight gradient on all stages of a rank.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import ModuleType

import pytest
from closed_forms import ALIVE, EQUAL, UNEQUAL, WAITS, Times, planned, sizes

from megalite.pipeline import building_blocks, dualpipe_v, placement, schedules, zb_v
from megalite.pipeline.actions import Op, Order, PlanError
from megalite.pipeline.check import check_program
from megalite.pipeline.costs import Costs
from megalite.pipeline.lower import lower
from megalite.pipeline.schedules import SCHEDULES, forward_only, make_plan
from megalite.pipeline.simulate import simulate
from megalite.pipeline.timing import makespan


def check_size(name: str, p: int, n: int, chunks: int, times: Times) -> None:
    """The plan is whole, its program ends, after the time and within the memory that it should."""
    plan, costs = planned(name, p, n, chunks, times)
    program = lower(plan, costs)
    check_program(program)
    step = simulate(program, costs)
    v = plan.num_stages // p
    waits = WAITS[name](p, n, v, *times)
    work = n * sum(times)
    if waits is None:
        assert step.makespan > work - 1e-9
    else:
        assert step.makespan == pytest.approx(work + waits), (p, n, v, times)
        assert step.bubble() == pytest.approx(waits / (work + waits), abs=1e-9)
    peaks = [costs.peak(order) / v for order in plan.ranks]
    alive = [ALIVE[name](p, n, v, rank) for rank in range(p)]
    if SCHEDULES[name].keeps is None:
        assert peaks == pytest.approx(alive)
    else:
        assert all(a <= b for a, b in zip(peaks, alive, strict=True)), (p, n, v, peaks)
        if n >= 2 * p and name != "dualpipe-v":
            assert max(peaks) > alive[0] - 1, "the bound is not what it keeps"


CHUNKED = [
    (name, chunks)
    for name, schedule in SCHEDULES.items()
    for chunks in (range(1, 5) if schedule.chunks[1] == 0 else schedule.chunks[1:])
    if name != "1f1b" or chunks == 1
]


@pytest.mark.parametrize(("name", "chunks"), CHUNKED)
def test_schedules(name: str, chunks: int) -> None:
    for ranks in (1, 2, 3, 4, 6):
        for n in sizes(ranks):
            check_size(name, ranks, n, chunks, EQUAL)


@pytest.mark.parametrize("times", UNEQUAL)
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_with_unequal_times(name: str, times: Times) -> None:
    for ranks in (2, 5):
        for n in sizes(ranks):
            check_size(name, ranks, n, 0, times)


@pytest.mark.full
@pytest.mark.parametrize("ranks", range(1, 17))
@pytest.mark.parametrize(("name", "chunks"), CHUNKED)
def test_all_schedules(name: str, chunks: int, ranks: int) -> None:
    for n in range(1, 4 * ranks + 2):
        check_size(name, ranks, n, chunks, EQUAL)
    for times in UNEQUAL if ranks <= 8 else ():
        for n in sizes(ranks):
            check_size(name, ranks, n, chunks, times)


def test_every_schedule_has_its_closed_form_and_its_bound() -> None:
    assert set(WAITS) == set(ALIVE) == set(SCHEDULES)


def test_messages_cost_no_more_than_they_must() -> None:
    """No message stands in the way of another, but where two of one channel are made at once."""
    for name in SCHEDULES:
        for p, n in ((2, 4), (3, 7), (4, 8), (6, 24)):
            for times in (EQUAL, (1.0, 1.1, 0.9)):
                plan, costs = planned(name, p, n, 0, times, message=0.05)
                step = simulate(lower(plan, costs), costs)
                ideal = makespan(plan, costs)
                assert ideal - 1e-9 <= step.makespan <= 1.005 * ideal, (name, p, n, times)


def test_zb_h2_gains_only_in_the_span_of_each_rank() -> None:
    h1, h2 = (
        simulate(lower(plan), Costs.uniform(4))
        for plan in (make_plan(name, 4, 12) for name in ("zb-h1", "zb-h2"))
    )
    assert h1.makespan == h2.makespan == 12 * 3 + 3
    assert h2.bubble_of_spans() == pytest.approx(0.0)
    assert h1.bubble_of_spans() == pytest.approx(3 / 39)


def forwards_take(count: int, stage_rank: tuple[int, ...]) -> float:
    program = lower(forward_only(count, stage_rank))
    check_program(program)
    return simulate(program, Costs.uniform(len(stage_rank))).makespan


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
def test_forward_only(p: int) -> None:
    for n in range(1, 3 * p + 2):
        assert forwards_take(n, placement.looped(p)) == n + p - 1
        assert forwards_take(n, placement.v_shaped(p)) == 2 * n + 2 * p - 2
        for v in (2, 3) if n % p == 0 else ():
            assert forwards_take(n, placement.looped(p, v)) == n * v + p - 1


def mutant(module: ModuleType, old: str, new: str) -> ModuleType:
    """A copy of a module with one planted fault."""
    source = inspect.getsource(module)
    assert old in source, f"{module.__name__} has changed: {old!r} is not in it"
    copy = ModuleType(module.__name__)
    exec(compile(source.replace(old, new, 1), module.__name__, "exec"), copy.__dict__)
    return copy


@pytest.mark.parametrize(
    ("name", "module", "old", "new"),
    [
        ("gpipe", schedules, "for c in reversed(range(chunks))", "for c in range(chunks)"),
        ("1f1b", schedules, "ahead = num_ranks - rank - 1", "ahead = num_ranks - rank"),
        ("1f1b", schedules, "ahead = num_ranks - rank - 1", "ahead = num_ranks - rank - 2"),
        ("interleaved", schedules, "2 * ahead + (chunks", "ahead + (chunks"),
        ("interleaved", schedules, "2 * ahead + (chunks", "2 * ahead + 1 + (chunks"),
        ("interleaved", schedules, "(number < larger)", "(number >= count - larger)"),
        ("interleaved", schedules, "(last - c) * num_ranks", "c * num_ranks"),
        ("zb-h1", schedules, "h1_order, (1, 1), lambda p: p", "h1_order, (1, 1), lambda p: p + 1"),
        ("zb-h2", schedules, "2 * (num_ranks - rank - 1)", "2 * (num_ranks - rank)"),
        ("zb-h2", schedules, "2 * (num_ranks - rank - 1)", "num_ranks - rank - 1"),
        ("zb-v", zb_v, "repeat(2 * after + 1, forward)", "repeat(2 * after + 2, forward)"),
        ("zb-v", zb_v, "repeat(2 * after + 1, forward)", "repeat(after + 1, forward)"),
        ("zb-v", zb_v, "repeat(after + 1, forward_back, ", "repeat(after, forward_back, "),
        ("v-half", building_blocks, "(1, 2, 1, 2)", "(2, 2, 1, 2)"),
        ("v-min", building_blocks, "(1, 1, 1, 1)", "(1, 2, 1, 1)"),
        ("v-min", building_blocks, "sum(turn), turn", "-sum(turn), turn"),
        ("dualpipe-v", dualpipe_v, "repeat(2 * after, forward)", "repeat(2 * after + 1, forward)"),
        ("dualpipe-v", dualpipe_v, "(after, backward_back, f", "(rank, backward_back, f"),
    ],
)  # fmt: skip
def test_planted_faults_are_caught(
    name: str, module: ModuleType, old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = mutant(module, old, new)
    if module is schedules:
        changed = faulty.SCHEDULES[name]
    else:
        order = getattr(faulty, SCHEDULES[name].order.__name__)
        changed = replace(SCHEDULES[name], order=order)
    monkeypatch.setattr(schedules, "SCHEDULES", {**SCHEDULES, name: changed})
    with pytest.raises((AssertionError, PlanError)):
        check_small_sizes(name)


def check_small_sizes(name: str) -> None:
    for ranks in (2, 3, 4, 6):
        for n in sizes(ranks):
            for times in (EQUAL, (1.0, 2.0, 2.0)):
                check_size(name, ranks, n, 2 if name == "gpipe" else 0, times)


def test_nothing_else_is_caught() -> None:
    for name in SCHEDULES:
        check_small_sizes(name)


def test_the_orders_of_a_rank_are_the_papers() -> None:
    """One rank of each, as the figures of the papers show it: the second of four, n = 8."""

    def shown(order: Order) -> str:
        return " ".join(str(a) for a in order if a.op is not Op.WEIGHT_GRADIENT)

    rank = {name: shown(make_plan(name, 4, 8).ranks[1]) for name in SCHEDULES}
    assert rank["1f1b"].startswith("1F0 1F1 1F2 1B0 1F3 1B1 1F4 1B2")
    assert rank["interleaved"].startswith(
        "1F0 1F1 1F2 1F3 5F0 5F1 5F2 5F3 1F4 5B0 1F5 5B1 1F6 5B2 1F7 5B3 5F4 1B0"
    )
    assert rank["zb-h2"].startswith("1F0 1F1 1F2 1F3 1F4 1I0 1F5 1I1")
    assert rank["zb-v"].startswith("1F0 1F1 1F2 1F3 1F4 6F0 1F5 6F1 6I0 6F2 6I1 6F3 6I2 1F6 1I0")
    assert rank["dualpipe-v"].startswith("1F0 1F1 1F2 1F3 1F4 6F0 1F5 6F1 6I0 6F2 6I1 6F3 1F6 6I2")
