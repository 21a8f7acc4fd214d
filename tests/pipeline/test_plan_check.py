"""Every broken plan or program is refused before anything runs, with ranks and actions named."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megalite.pipeline.actions import Action, Plan, PlanError, Program
from megalite.pipeline.check import check_plan, check_program, find_deadlock
from megalite.pipeline.costs import Costs
from megalite.pipeline.lower import lower
from megalite.pipeline.schedules import forward_only, make_plan
from megalite.pipeline.simulate import simulate

Orders = list[list[Action]]


def actions(text: str) -> tuple[Action, ...]:
    return tuple(map(Action.parse, text.split()))


def broken(name: str, change: Callable[[Orders], object]) -> Plan:
    """A plan of 3 ranks and 4 micro-batches with something changed in it."""
    plan = make_plan(name, 3, 4)
    ranks = [list(order) for order in plan.ranks]
    change(ranks)
    return Plan(plan.name, 4, plan.stage_rank, tuple(map(tuple, ranks)))


def move(order: list[Action], action: str, before: str) -> None:
    """Take an action out and put it before another."""
    order.remove(Action.parse(action))
    order.insert(order.index(Action.parse(before)), Action.parse(action))


def put(ranks: Orders, rank: int, action: str) -> None:
    ranks[rank].append(Action.parse(action))


def swap(order: list[Action], old: str, *new: str) -> None:
    """Other actions in the place of one."""
    at = order.index(Action.parse(old))
    order[at : at + 1] = map(Action.parse, new)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("1f1b", lambda r: r[1].remove(Action.parse("1F0")), "plan 1f1b: rank 1: 1F0 is missing"),
        ("1f1b", lambda r: r[1].remove(Action.parse("1B3")), "rank 1: 1B3 is missing"),
        ("1f1b", lambda r: put(r, 1, "1F2"), "rank 1: 1F2 stands 2 times"),
        ("1f1b", lambda r: put(r, 0, "2F1"), "rank 0: 2F1 belongs to rank 2"),
        ("1f1b", lambda r: put(r, 0, "7F0"), "rank 0: 7F0 names stage 7, the last is 2"),
        ("1f1b", lambda r: put(r, 2, "2F4"), "rank 2: 2F4 names micro-batch 4, the last is 3"),
        ("1f1b", lambda r: put(r, 0, "0SEND_F0"), "rank 0: 0SEND_F0 is not an action of this plan"),
        ("1f1b", lambda r: move(r[2], "2B0", "2F0"), "rank 2: 2B0 stands before 2F0"),
        ("1f1b", lambda r: put(r, 1, "1W0"), "1B0 and 1W0 both stand: a backward is whole or"),
        ("1f1b", lambda r: swap(r[1], "1B0", "1I0"), "1W0 is missing"),
        ("zb-h1", lambda r: r[0].remove(Action.parse("0I2")), "rank 0: 0I2 is missing"),
        ("zb-h1", lambda r: r[0].remove(Action.parse("0W2")), "0W2 is missing"),
        ("zb-h1", lambda r: move(r[1], "1W1", "1I1"), "rank 1: 1W1 stands before 1I1"),
        ("zb-v", lambda r: move(r[2], "3F1", "2F1"), "rank 2: 3F1 stands before 2F1"),
        ("zb-v", lambda r: move(r[2], "2I1", "3I1"), "rank 2: 2I1 stands before 3I1"),
        ("interleaved", lambda r: move(r[0], "0B0", "0F0"), "rank 0: 0B0 stands before 0F0"),
    ],
)
def test_a_broken_plan_is_refused(
    name: str, change: Callable[[Orders], object], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        check_plan(broken(name, change))


def test_backwards_may_be_whole_and_split_in_one_plan() -> None:
    check_program(lower(broken("1f1b", lambda ranks: swap(ranks[1], "1B0", "1I0", "1W0"))))


def test_several_violations_are_reported_together() -> None:
    def change(ranks: Orders) -> None:
        ranks[0].pop(0)
        ranks[2].pop()

    with pytest.raises(PlanError, match=r"0F0 is missing.*2B3 is missing"):
        check_plan(broken("1f1b", change))


def test_a_thousand_violations_are_cut() -> None:
    plan = make_plan("1f1b", 2, 100)
    with pytest.raises(PlanError, match=r"0F0 is missing.*; and 380 more$"):
        check_plan(Plan("mine", 100, plan.stage_rank, ((), ())))


def test_a_plan_of_forwards_has_no_backward() -> None:
    plan = forward_only(2, (0, 1))
    check_program(lower(plan))
    ranks = (plan.ranks[0], (*plan.ranks[1], Action.parse("1B0")))
    with pytest.raises(PlanError, match="rank 1: 1B0 is not an action of this plan"):
        check_plan(Plan("mine", 2, (0, 1), ranks, has_backward=False))


def program_of(*ranks: str, micro_batches: int = 2) -> Program:
    """A program of one stage on each rank, written by hand."""
    steps = tuple(map(actions, ranks))
    computed = tuple(tuple(a for a in order if "_" not in a.op) for order in steps)
    return Program(Plan("mine", micro_batches, tuple(range(len(ranks))), computed), steps)


def test_a_program_that_would_hang_names_ranks_and_messages() -> None:
    """Rank 0 wants the backward of micro-batch 0 before it forwards 1; rank 1 wants 1 first."""
    program = program_of(
        "0F0 0SEND_F0 0RECV_B0 0B0 0F1 0SEND_F1 0RECV_B1 0B1",
        "1RECV_F0 1F0 1RECV_F1 1F1 1B0 1SEND_B0 1B1 1SEND_B1",
    )
    assert [(rank, str(action)) for rank, action in find_deadlock(program)] == [
        (0, "0RECV_B0"),
        (1, "1RECV_F1"),
    ]
    with pytest.raises(PlanError, match=r"would hang: rank 0 in 0RECV_B0, rank 1 in 1RECV_F1"):
        check_program(program)


def test_a_rank_that_must_not_wait_for_its_own_receive_is_refused() -> None:
    """Rank 0 begins to receive what depends on its next forward: it hangs if that one has to wait
    for what is under way, as a GPU does that loads a kernel."""
    program = program_of(
        "0F0 0SEND_F0 0RECV_B0 0F1 0SEND_F1 0B0 0RECV_B1 0B1",
        "1RECV_F0 1F0 1RECV_F1 1F1 1B0 1SEND_B0 1B1 1SEND_B1",
    )
    simulate(program, Costs.uniform(2))  # which would end if nothing waited but by need
    with pytest.raises(PlanError, match=r"would hang: rank 0 in 0RECV_B0, rank 1 in 1RECV_F1"):
        check_program(program)


def test_messages_that_wait_for_each_other_are_refused() -> None:
    """Three ranks, each of whose channels would pass its second message first.

    The order of each pair of ranks agrees at both of its ends: only together they hang. On a back
    end without order within a rank's channel this would run.
    """
    good = lower(make_plan("1f1b", 3, 4))
    assert find_deadlock(good) == []
    steps = list(good.ranks[1])
    send = steps.index(Action.parse("1SEND_F0"))
    receive = steps.index(Action.parse("1RECV_F3"))
    user = steps.index(Action.parse("1F0"))
    assert user < send < receive
    # Rank 1 awaits what rank 0 sends last before it passes on what rank 2 needs first.
    late = steps.pop(receive)
    others = [steps.index(Action.parse(f"1RECV_F{i}")) for i in (1, 2)]
    moved = [steps.pop(at) for at in sorted(others, reverse=True)][::-1]
    at = steps.index(Action.parse("1SEND_F0"))
    steps[at:at] = [*moved, late]
    wrong = Program(good.plan, (good.ranks[0], tuple(steps), good.ranks[2]))
    with pytest.raises(PlanError, match=r"would hang: rank 0 in .*, rank 1 in .*, rank 2 in"):
        check_program(wrong)


def test_receives_in_another_order_than_sends_are_refused() -> None:
    program = program_of(
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
        "1RECV_F1 1F1 1RECV_F0 1F0 1B0 1SEND_B0 1B1 1SEND_B1",
    )
    with pytest.raises(PlanError, match=r"rank 0 sends 1RECV_F0 where rank 1 receives 1RECV_F1"):
        check_program(program)


def changed(name: str, rank: int, change: Callable[[list[Action]], object]) -> Program:
    """A program with the steps of one rank changed."""
    program = lower(make_plan(name, 3, 4))
    ranks = [list(steps) for steps in program.ranks]
    change(ranks[rank])
    return Program(program.plan, tuple(map(tuple, ranks)))


def drop(action: str) -> Callable[[list[Action]], object]:
    return lambda steps: steps.remove(Action.parse(action))


def add(action: str) -> Callable[[list[Action]], object]:
    return lambda steps: steps.append(Action.parse(action))


@pytest.mark.parametrize(
    ("name", "rank", "change", "complaint"),
    [
        ("1f1b", 1, drop("1RECV_F2"), "rank 1: 1F2 lacks 1RECV_F2"),
        ("1f1b", 0, drop("0SEND_F3"), "rank 0 never sends what rank 1 awaits in 1RECV_F3"),
        ("1f1b", 2, drop("2SEND_B0"), "rank 2 sends 1RECV_B1 where rank 1 receives 1RECV_B0"),
        ("1f1b", 2, drop("2SEND_B3"), "rank 2 never sends what rank 1 awaits in 1RECV_B3"),
        ("1f1b", 0, drop("0B3"), "rank 0: 0B3 is planned where nothing runs"),
        ("1f1b", 1, add("1F0"), "rank 1: nothing is planned where 1F0 runs"),
        ("1f1b", 0, add("0SEND_F1"), "0SEND_F1 stands 2 times"),
        ("1f1b", 2, add("2SEND_F1"), "rank 2: 2SEND_F1 has no rank at its other end"),
        ("1f1b", 0, add("0SEND_B1"), "rank 0: 0SEND_B1 has no rank at its other end"),
        ("1f1b", 0, add("1SEND_B1"), "rank 0: 1SEND_B1 belongs to rank 1"),
        ("1f1b", 1, lambda s: move(s, "1SEND_F0", "1F0"), "rank 1: 1SEND_F0 lacks 1F0"),
        ("1f1b", 1, lambda s: s.append(s.pop(s.index(Action.parse("1RECV_F3")))), "1F3 lacks 1RE"),
        ("zb-v", 2, add("2SEND_F0"), "rank 2: 2SEND_F0 has no rank at its other end"),
        ("zb-h1", 2, lambda s: move(s, "2SEND_B0", "2I0"), "rank 2: 2SEND_B0 lacks 2B0"),
    ],
)
def test_a_broken_program_is_refused(
    name: str, rank: int, change: Callable[[list[Action]], object], complaint: str
) -> None:
    with pytest.raises(PlanError, match=complaint):
        check_program(changed(name, rank, change))


def test_a_send_that_nobody_takes_is_refused() -> None:
    program = program_of("0F0 0SEND_F0 0B0", "1F0 1B0", micro_batches=1)
    with pytest.raises(PlanError, match=r"rank 1: 1F0 lacks 1RECV_F0"):
        check_program(program)
