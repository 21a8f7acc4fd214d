"""The simulator's times, waits and bubbles, by hand and against another way to compute them."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from closed_forms import EQUAL, planned

from megalite.pipeline.actions import Action, Op, Plan, Program
from megalite.pipeline.costs import Costs
from megalite.pipeline.lower import lower
from megalite.pipeline.schedules import SCHEDULES, make_plan
from megalite.pipeline.simulate import DeadlockError, Span, simulate
from megalite.pipeline.timing import end_times


def actions(text: str) -> tuple[Action, ...]:
    return tuple(map(Action.parse, text.split()))


def test_a_step_by_hand() -> None:
    """Two ranks, two micro-batches, messages of half a unit; who waits for whom, how long."""
    plan = make_plan("1f1b", 2, 2)
    costs = Costs.uniform(2, message=0.5)
    step = simulate(lower(plan), costs)
    parse = Action.parse
    assert list(step.spans) == [
        Span(0, parse("0F0"), 0.0, 1.0),
        Span(0, parse("0F1"), 1.0, 2.0),
        Span(1, parse("1F0"), 1.5, 2.5, waits_for=0, waited=1.5),
        Span(1, parse("1B0"), 2.5, 4.5),
        Span(1, parse("1F1"), 4.5, 5.5),
        Span(0, parse("0B0"), 5.0, 7.0, waits_for=1, waited=3.0),
        Span(1, parse("1B1"), 5.5, 7.5),
        Span(0, parse("0B1"), 8.0, 10.0, waits_for=1, waited=1.0),
    ]
    assert step.makespan == 10.0
    assert step.busy(0) == step.busy(1) == 6.0
    assert step.bubble() == pytest.approx(1 - 12 / 20)
    assert step.bubble_of_spans() == pytest.approx(1 - 6 / 10)


def test_messages_of_a_channel_run_one_after_the_other() -> None:
    """Two sends at once take turns; the other direction does not wait for them."""
    plan = Plan("mine", 2, (0, 1), (actions("0F0 0F1"), actions("1F0 1F1")), has_backward=False)
    steps = (actions("0F0 0F1 0SEND_F0 0SEND_F1"), actions("1RECV_F0 1RECV_F1 1F0 1F1"))
    step = simulate(Program(plan, steps), Costs.uniform(2, message=5.0))
    assert [span.start for span in step.spans if span.rank == 1] == [7.0, 12.0]


def test_a_message_starts_when_both_ends_have_started_it() -> None:
    plan = Plan("mine", 1, (0, 1, 1), (actions("0F0"), actions("1F0 2F0")), has_backward=False)
    early = simulate(lower(plan), Costs.uniform(3, message=1.0))
    assert early.makespan == 4.0
    twice = Plan("mine", 2, (0, 1), (actions("0F0 0F1"), actions("1F0 1F1")), has_backward=False)
    late = (actions("0F0 0SEND_F0 0F1 0SEND_F1"), actions("1RECV_F0 1F0 1RECV_F1 1F1"))
    costs = replace(Costs.uniform(2, message=1.0), forward=(1.0, 4.0))
    # The second message is there to be sent from time 2 on, and taken only when 1F0 ends at 6.
    step = simulate(Program(twice, late), costs)
    assert [span.start for span in step.spans if span.rank == 1] == [2.0, 7.0]


def test_a_deadlock_names_who_waits_in_what() -> None:
    plan = make_plan("1f1b", 2, 1)
    steps = (actions("0F0 0RECV_B0 0B0"), actions("1RECV_F0 1F0 1B0 1SEND_B0"))
    with pytest.raises(DeadlockError, match=r"rank 0 in 0RECV_B0, rank 1 in 1RECV_F0") as caught:
        simulate(Program(plan, steps), Costs.uniform(2))
    assert caught.value.waiting == [
        (0, Action.parse("0RECV_B0")),
        (1, Action.parse("1RECV_F0")),
    ]


def test_bubble_of_spans_counts_neither_the_way_in_nor_out() -> None:
    costs = Costs.uniform(4)
    step = simulate(lower(make_plan("gpipe", 4, 4)), costs)
    assert step.bubble() == pytest.approx(3 / 7)
    # Rank 0 waits 9 of 21 units inside its span; rank 3 never waits.
    assert step.bubble_of_spans() == pytest.approx(9 / 21)


def longest_paths(plan: Plan, costs: Costs) -> dict[Action, float]:
    """Ends by the longest way to each action, found by relaxing all edges until nothing moves."""
    edges: list[tuple[Action, Action, float]] = []
    for order in plan.ranks:
        edges += [(a, b, 0.0) for a, b in pairwise(order)]
    makers = {}
    for order in plan.ranks:
        for a in order:
            if a.op is not Op.WEIGHT_GRADIENT:
                makers[a.stage, a.op is Op.FORWARD, a.micro_batch] = a
    for (stage, forward, i), action in makers.items():
        source = makers.get((stage - 1 if forward else stage + 1, forward, i))
        if source is not None:
            apart = plan.stage_rank[source.stage] != plan.stage_rank[stage]
            edges.append((source, action, costs.message if apart else 0.0))
    ends = {a: costs.of(a) for order in plan.ranks for a in order}
    moved = True
    while moved:
        moved = False
        for a, b, delay in edges:
            end = ends[a] + delay + costs.of(b)
            if end > ends[b] + 1e-12:
                ends[b], moved = end, True
    return ends


@pytest.mark.parametrize("name", SCHEDULES)
def test_ends_are_longest_paths(name: str) -> None:
    chance = random.Random(name)
    for p, n in ((1, 3), (2, 3), (3, 5), (4, 8)):
        plan, costs = planned(name, p, n, 0, EQUAL)
        stages = plan.num_stages
        uneven = replace(
            costs,
            forward=tuple(chance.uniform(0.5, 1.5) for _ in range(stages)),
            backward=tuple(chance.uniform(1.0, 3.0) for _ in range(stages)),
            input_gradient=tuple(chance.uniform(0.5, 1.5) for _ in range(stages)),
            weight_gradient=tuple(chance.uniform(0.1, 1.0) for _ in range(stages)),
            message=0.1,
        )
        expected = longest_paths(plan, uneven)
        assert end_times(plan, uneven) == pytest.approx(expected)
        step = simulate(lower(plan, uneven), uneven)
        for span in step.spans:
            # In a program messages may stand in each other's way, so later but never earlier.
            assert span.end >= expected[span.action] - 1e-9
            assert span.end - span.start == pytest.approx(uneven.of(span.action))
            assert (span.waits_for >= 0) == (span.waited > 0)
        assert len(step.spans) == sum(map(len, plan.ranks))
        waited = [sum(s.waited for s in step.spans if s.rank == rank) for rank in range(p)]
        last = [max(s.end for s in step.spans if s.rank == rank) for rank in range(p)]
        for rank in range(p):
            assert last[rank] == pytest.approx(step.busy(rank) + waited[rank])
