"""Every plan is whole and free of deadlock, takes as long as its closed form says and keeps as many
micro-batches alive; every broken plan is refused with ranks and actions named."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megalite.pipeline.actions import Action, Exchange, Op, Plan, PlanError, Program
from megalite.pipeline.check import check_plan, check_program, find_deadlock
from megalite.pipeline.lower import lower
from megalite.pipeline.schedules import SCHEDULES, forward_only, gpipe, one_f_one_b
from megalite.pipeline.simulate import simulate

UNEVEN = {Op.FORWARD: 1.0, Op.BACKWARD: 2.0}
LIVE: dict[str, Callable[[int, int, int], int]] = {
    "1f1b": lambda pp, n, rank: min(n, pp - rank),
    "gpipe": lambda _pp, n, _rank: n,
}


def check_size(schedule: str, pp: int, n: int) -> None:
    program = lower(SCHEDULES[schedule](pp, n))
    check_program(program)
    step = simulate(program, UNEVEN)
    assert step.makespan == (n + pp - 1) * 3.0
    assert step.bubble() == pytest.approx((pp - 1) / (n + pp - 1))
    assert step.peak_live == tuple(LIVE[schedule](pp, n, rank) for rank in range(pp))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pp", [1, 2, 3, 4, 7, 8])
def test_schedules(schedule: str, pp: int) -> None:
    for n in range(1, 4 * pp + 1):
        check_size(schedule, pp, n)


@pytest.mark.full
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pp", range(1, 17))
def test_all_schedules(schedule: str, pp: int) -> None:
    for n in range(1, 4 * pp + 1):
        check_size(schedule, pp, n)


@pytest.mark.parametrize("pp", [1, 2, 5])
def test_forward_only(pp: int) -> None:
    program = lower(forward_only(pp, 3))
    check_program(program)
    assert simulate(program, UNEVEN).makespan == 3 + pp - 1


def test_unequal_durations_give_the_closed_form_too() -> None:
    for forward, backward in ((1.0, 1.0), (1.0, 3.0), (2.0, 1.0)):
        step = simulate(lower(one_f_one_b(4, 6)), {Op.FORWARD: forward, Op.BACKWARD: backward})
        assert step.makespan == 9 * (forward + backward)


def test_text_form_parses_back() -> None:
    for program in (lower(one_f_one_b(3, 4)), lower(gpipe(3, 2))):
        for steps in program.ranks:
            for step in steps:
                for action in step.messages if isinstance(step, Exchange) else (step,):
                    assert Action.parse(str(action)) == action
    assert str(Action(1, Op.RECV_BACKWARD, 12)) == "1RECV_B12"
    for text in ("F", "1X2", "1F", "-1F2", "1f2"):
        with pytest.raises(ValueError, match="is not an action"):
            Action.parse(text)


def test_golden_program() -> None:
    lines = [" ".join(map(str, steps)) for steps in lower(one_f_one_b(2, 3)).ranks]
    assert lines == [
        "0F0 {0SEND_F0} 0F1 {0SEND_F1 0RECV_B0} 0B0 0F2 {0SEND_F2 0RECV_B1} 0B1 {0RECV_B2} 0B2",
        "{1RECV_F0} 1F0 1B0 {1SEND_B0 1RECV_F1} 1F1 1B1 {1SEND_B1 1RECV_F2} 1F2 1B2 {1SEND_B2}",
    ]


def broken(change: Callable[[list[list[Action]]], None]) -> Plan:
    plan = one_f_one_b(3, 4)
    ranks = [list(order) for order in plan.ranks]
    change(ranks)
    return Plan(plan.name, 4, plan.stage_rank, tuple(tuple(order) for order in ranks))


def swap(order: list[Action], a: int, b: int) -> None:
    order[a], order[b] = order[b], order[a]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ranks: ranks[1].pop(0), "1F0 is missing"),
        (lambda ranks: ranks[1].append(Action(1, Op.FORWARD, 2)), "1F2 stands 2 times"),
        (lambda ranks: ranks[0].append(ranks[2].pop()), "rank 0: 2B3 belongs to rank 2"),
        (lambda ranks: swap(ranks[2], 0, 1), "rank 2: 2B0 stands before 2F0"),
        (lambda ranks: ranks[0].append(Action(7, Op.FORWARD, 0)), "7F0 is not an action"),
        (lambda ranks: ranks[0].append(Action(0, Op.SEND_FORWARD, 0)), "0SEND_F0 is not an action"),
    ],
)
def test_a_broken_plan_is_refused(
    change: Callable[[list[list[Action]]], None], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        check_plan(broken(change))


def test_several_violations_are_reported_together() -> None:
    def change(ranks: list[list[Action]]) -> None:
        ranks[0].pop(0)
        ranks[2].pop()

    with pytest.raises(PlanError, match=r"(?s)0F0 is missing.*2B3 is missing"):
        check_plan(broken(change))


def test_a_plan_that_would_hang_names_ranks_and_actions() -> None:
    # Rank 0 wants the backward of micro-batch 0 before it forwards 1; rank 1 wants 1 first.
    ranks = (
        tuple(map(Action.parse, ["0F0", "0B0", "0F1", "0B1"])),
        tuple(map(Action.parse, ["1F0", "1F1", "1B0", "1B1"])),
    )
    program = lower(Plan("mine", 2, (0, 1), ranks))
    assert find_deadlock(program)
    with pytest.raises(PlanError, match=r"would hang: rank 0 in 0RECV_B0, rank 1 in 1RECV_F1"):
        check_program(program)


def test_sends_that_are_received_in_another_order_are_refused() -> None:
    ranks = (
        tuple(map(Action.parse, ["0F0", "0F1", "0B0", "0B1"])),
        tuple(map(Action.parse, ["1F1", "1F0", "1B0", "1B1"])),
    )
    with pytest.raises(PlanError, match=r"rank 0 sends 0SEND_F0 where rank 1 receives 1RECV_F1"):
        check_program(lower(Plan("mine", 2, (0, 1), ranks)))


def without(program: Program, rank: int, message: str) -> Program:
    """The program with one message taken out of one rank."""
    steps = []
    for step in program.ranks[rank]:
        if isinstance(step, Exchange):
            kept = tuple(m for m in step.messages if str(m) != message)
            if kept:
                steps.append(Exchange(kept))
        else:
            steps.append(step)
    ranks = list(program.ranks)
    ranks[rank] = tuple(steps)
    return Program(program.plan, tuple(ranks))


@pytest.mark.parametrize(
    ("rank", "message", "complaint"),
    [
        (1, "1RECV_F2", "rank 1: 1F2 lacks 1RECV_F2"),
        (0, "0SEND_F3", "rank 0 never sends what rank 1 awaits in 1RECV_F3"),
        (2, "2SEND_B0", "rank 2 sends 2SEND_B1 where rank 1 receives 1RECV_B0"),
    ],
)
def test_a_program_without_one_of_its_messages_is_refused(
    rank: int, message: str, complaint: str
) -> None:
    with pytest.raises(PlanError, match=complaint):
        check_program(without(lower(one_f_one_b(3, 4)), rank, message))


def with_steps(program: Program, rank: int, *steps: Action | Exchange) -> Program:
    """The program with steps appended to one rank."""
    ranks = list(program.ranks)
    ranks[rank] = (*ranks[rank], *steps)
    return Program(program.plan, tuple(ranks))


def exchange(*messages: str) -> Exchange:
    return Exchange(tuple(map(Action.parse, messages)))


def test_a_program_that_is_not_its_plan_is_refused() -> None:
    program = lower(one_f_one_b(3, 4))
    missing = Program(program.plan, (program.ranks[0][:-1], *program.ranks[1:]))
    twice = with_steps(with_steps(program, 0, exchange("0SEND_F1")), 1, exchange("1RECV_F1"))
    for wrong, complaint in (
        (missing, "rank 0: 0B3 is planned where nothing runs"),
        (with_steps(program, 1, Action.parse("1F0")), "rank 1: nothing is planned where 1F0 runs"),
        (twice, "0SEND_F1 stands 2 times; 1RECV_F1 stands 2 times"),
        (with_steps(program, 2, exchange("2SEND_F1")), "2SEND_F1 has no rank at its other end"),
        (with_steps(program, 0, exchange("0SEND_B1")), "0SEND_B1 has no rank at its other end"),
        (with_steps(program, 0, exchange("1SEND_B1")), "rank 0: 1SEND_B1 belongs to rank 1"),
        (with_steps(program, 0, Exchange((Action(0, Op.FORWARD, 1),))), "0F1 has no rank"),
    ):
        with pytest.raises(PlanError, match=complaint):
            check_program(wrong)


def test_all_ranks_of_a_step_against_an_independent_simulation() -> None:
    """Start times by the longest-path recurrence, written anew."""
    plan = one_f_one_b(4, 7)
    program = lower(plan)
    step = simulate(program, UNEVEN)
    ends: dict[Action, float] = {}
    last_of_rank: dict[int, float] = {}
    pending = [list(order) for order in plan.ranks]
    while any(pending):
        for rank, order in enumerate(pending):
            if not order:
                continue
            action = order[0]
            neighbour = action.stage + (-1 if action.op is Op.FORWARD else 1)
            ready = last_of_rank.get(rank, 0.0)
            if 0 <= neighbour < 4:
                source = Action(neighbour, action.op, action.micro_batch)
                if source not in ends:
                    continue
                ready = max(ready, ends[source])
            ends[action] = last_of_rank[rank] = ready + UNEVEN[action.op]
            order.pop(0)
    assert {span.action: span.end for span in step.spans} == ends
