"""Messages of a program: where they stand, and that no rank can wait for ever, whatever the plan.

Random plans are run a second time by a program written otherwise, in which a rank goes on only when
the message that it has started has passed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from megalite.pipeline.actions import SENDS, Action, Op, Order, Plan, PlanError, Program
from megalite.pipeline.channels import counterpart, is_message, received_for
from megalite.pipeline.check import check_plan, check_program
from megalite.pipeline.costs import Costs
from megalite.pipeline.lower import lower
from megalite.pipeline.schedules import SCHEDULES, make_plan
from megalite.pipeline.timing import end_times


def lines(program: Program) -> list[str]:
    return [" ".join(map(str, steps)) for steps in program.ranks]


def test_golden_1f1b() -> None:
    assert lines(lower(make_plan("1f1b", 2, 3))) == [
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0F2 0SEND_F2 0B1 0RECV_B2 0B2",
        "1RECV_F0 1RECV_F1 1F0 1B0 1SEND_B0 1F1 1B1 1SEND_B1 1RECV_F2 1F2 1B2 1SEND_B2",
    ]


def test_golden_v() -> None:
    """The turn of the V needs no message."""
    assert lines(lower(make_plan("zb-v", 2, 2))) == [
        "0F0 0SEND_F0 0F1 0SEND_F1 3RECV_F0 3F0 3RECV_F1 3I0 3SEND_B0 3F1 3I1 3SEND_B1 0RECV_B0 "
        "0I0 0RECV_B1 3W0 0I1 3W1 0W0 0W1",
        "1RECV_F0 1RECV_F1 1F0 2F0 2SEND_F0 1F1 2F1 2SEND_F1 2RECV_B0 2I0 2RECV_B1 1I0 1SEND_B0 "
        "2I1 1I1 1SEND_B1 2W0 1W0 2W1 1W1",
    ]


def test_golden_1f1b_where_waiting_costs() -> None:
    """The second rank receives what is made during its forward after it, since the first waits."""
    costs = replace(Costs.uniform(2, message=0.01), forward=(0.9, 1.0), beside=0.15)
    assert lines(lower(make_plan("1f1b", 2, 3), costs)) == [
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0F2 0SEND_F2 0RECV_B1 0B1 0RECV_B2 0B2",
        "1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1B1 1RECV_F2 1SEND_B1 1F2 1B2 1SEND_B2",
    ]


def waiting(program: Program, costs: Costs) -> tuple[float, float]:
    """Time for which ranks compute while a message waits on them, and for which actions wait for
    messages that came late; if all actions ran when they would if no message waited."""
    plan, ends = program.plan, end_times(program.plan, costs)
    started: dict[Action, tuple[float, float]] = {}
    for steps in program.ranks:
        for index, step in enumerate(steps):
            if is_message(step):
                before = last_computation(steps, index)
                after = next((s for s in steps[index:] if not is_message(s)), None)
                goes_on = ends[after] - costs.of(after) if after else float("inf")
                started[step] = ends[steps[before]] if before >= 0 else 0.0, goes_on
    beside = late = 0.0
    for message in [step for step in started if step.op in SENDS]:
        ends_of_it = [started[message], started[counterpart(message)]]
        passes = max(begun for begun, _ in ends_of_it)
        beside += sum(max(0.0, passes - goes_on) for _, goes_on in ends_of_it)
        user = next(
            action
            for action in plan.ranks[plan.stage_rank[counterpart(message).stage]]
            if received_for(plan, action) == counterpart(message)
        )
        late += max(0.0, passes + costs.message - (ends[user] - costs.of(user)))
    return beside, late


@pytest.mark.parametrize("name", SCHEDULES)
def test_messages_are_started_when_it_costs_least(name: str) -> None:
    """Not more than where they are made; where waiting is dear and lateness is not, much less."""
    for ranks, n in ((2, 8), (4, 12)):
        plan = make_plan(name, ranks, n)
        plain = Costs.uniform(plan.num_stages, message=0.01)
        for skew in (0.0, 0.1):
            forward = tuple(1.0 + skew * (stage % ranks) for stage in range(plan.num_stages))
            costs = replace(plain, forward=forward, beside=0.15)
            by_cost, at_once = lower(plan, costs), lower(plan, replace(costs, beside=0.0))
            beside, late = waiting(by_cost, costs)
            beside_at_once, late_at_once = waiting(at_once, costs)
            assert late_at_once < 1e-9
            assert 0.15 * beside + late <= 0.15 * beside_at_once + 1e-9
            if beside_at_once > n / 2:
                assert beside < 0.6 * beside_at_once, (ranks, skew)


def test_a_single_rank_sends_nothing() -> None:
    for name in SCHEDULES:
        plan = make_plan(name, 1, 3)
        assert lower(plan).ranks == plan.ranks


@pytest.mark.parametrize("name", SCHEDULES)
def test_where_messages_stand(name: str) -> None:
    """A send right after its action, a receive before the one during which its content is made."""
    for ranks, n in ((2, 4), (4, 9), (5, 20)):
        plan = make_plan(name, ranks, n)
        ends = end_times(plan, Costs.uniform(plan.num_stages))
        for order, steps in zip(plan.ranks, lower(plan).ranks, strict=True):
            assert tuple(step for step in steps if not is_message(step)) == order
            for index, step in enumerate(steps):
                if step.op in SENDS:
                    assert steps[last_computation(steps, index)] in makers(step)
                elif is_message(step):
                    check_receive(plan, index, steps, ends)


def check_receive(plan: Plan, index: int, steps: Order, ends: Mapping[Action, float]) -> None:
    message = steps[index]
    content = next(ends[maker] for maker in makers(counterpart(message)) if maker in ends)
    before = last_computation(steps, index)
    assert before < 0 or ends[steps[before]] <= content, "begun after its content was made"
    after = next(step for step in steps[index:] if not is_message(step))
    assert content <= ends[after], "begun before it could come"
    user = next(i for i, step in enumerate(steps) if received_for(plan, step) == message)
    assert index < user


def last_computation(steps: Order, index: int) -> int:
    """Where the last computation before a step stands; -1 if there is none."""
    return max((i for i in range(index) if not is_message(steps[i])), default=-1)


def makers(send: Action) -> list[Action]:
    """The actions that may make what a message carries."""
    ops = (Op.FORWARD,) if send.op is Op.SEND_FORWARD else (Op.BACKWARD, Op.INPUT_GRADIENT)
    return [Action(send.stage, op, send.micro_batch) for op in ops]


def random_plan(chance: random.Random) -> Plan:
    """Any order that its dependencies allow, of stages dealt to ranks at random."""
    ranks, n = chance.randint(1, 4), chance.randint(1, 5)
    stages = ranks + chance.randint(0, 4)
    stage_rank = [*range(ranks), *(chance.randrange(ranks) for _ in range(stages - ranks))]
    chance.shuffle(stage_rank)
    needs: dict[Action, list[Action]] = {}
    for i in range(n):
        for stage in range(stages):
            forward = Action(stage, Op.FORWARD, i)
            needs[forward] = [Action(stage - 1, Op.FORWARD, i)] if stage else []
        after: list[Action] = []
        for stage in reversed(range(stages)):
            split = chance.random() < 0.5
            back = Action(stage, Op.INPUT_GRADIENT if split else Op.BACKWARD, i)
            needs[back] = [Action(stage, Op.FORWARD, i), *after]
            if split:
                needs[Action(stage, Op.WEIGHT_GRADIENT, i)] = [back]
            after = [back]
    orders: list[list[Action]] = [[] for _ in range(ranks)]
    done: set[Action] = set()
    while len(done) < len(needs):
        ready = [a for a, wanted in needs.items() if a not in done and done.issuperset(wanted)]
        action = chance.choice(ready)
        orders[stage_rank[action.stage]].append(action)
        done.add(action)
    return Plan("random", n, tuple(stage_rank), tuple(map(tuple, orders)))


def ends_strictly(program: Program) -> bool:
    """Whether all ranks reach their end if each goes on only when the message that it has started
    has passed, which it does once both of its ends have started it.

    Written without the checker: ranks are taken one step at a time in a random order.
    """
    plan = program.plan
    chance = random.Random(0)
    at = [0] * len(program.ranks)
    under_way: dict[int, tuple[str, int, int]] = {}
    passed: set[tuple[str, int, int]] = set()
    computed: set[Action] = set()

    def key(message: Action) -> tuple[str, int, int]:
        """Direction, receiving stage, micro-batch."""
        step = {Op.SEND_FORWARD: 1, Op.SEND_BACKWARD: -1}.get(message.op, 0)
        return message.op[-1], message.stage + step, message.micro_batch

    def may_run(rank: int) -> bool:
        step = program.ranks[rank][at[rank]]
        if is_message(step) or plan.source(step) is None:
            return True
        direction = "F" if step.op is Op.FORWARD else "B"
        neighbour = step.stage + (-1 if direction == "F" else 1)
        if plan.stage_rank[neighbour] != rank:
            return (direction, step.stage, step.micro_batch) in passed
        ops = (Op.FORWARD,) if direction == "F" else (Op.BACKWARD, Op.INPUT_GRADIENT)
        return any(Action(neighbour, op, step.micro_batch) in computed for op in ops)

    while True:
        going = [r for r, i in enumerate(at) if i < len(program.ranks[r]) and r not in under_way]
        able = [rank for rank in going if may_run(rank)]
        if not able:
            break
        rank = chance.choice(able)
        step = program.ranks[rank][at[rank]]
        if is_message(step):
            under_way[rank] = key(step)
            ends = [other for other, message in under_way.items() if message == key(step)]
            if len(ends) == 2:
                passed.add(key(step))
                for other in ends:
                    del under_way[other]
        else:
            computed.add(step)
        at[rank] += 1
    finished = all(i == len(steps) for i, steps in zip(at, program.ranks, strict=True))
    return finished and not under_way


def check_random_plans(seeds: Sequence[int]) -> None:
    for seed in seeds:
        chance = random.Random(seed)
        plan = random_plan(chance)
        check_plan(plan)
        stages = plan.num_stages
        costs = Costs.uniform(
            stages,
            forward=chance.choice([0.0, 0.5, 1.0, 3.0]),
            input_gradient=chance.choice([0.0, 1.0, 2.0]),
            weight_gradient=chance.choice([0.1, 1.0]),
            message=chance.choice([0.0, 0.3]),
        )
        costs = replace(costs, beside=chance.choice([0.0, 0.15, 2.0]))
        for program in (lower(plan), lower(plan, costs)):
            check_program(program)
            assert ends_strictly(program), f"seed {seed}"


def test_random_plans_never_hang() -> None:
    check_random_plans(range(150))


@pytest.mark.full
def test_more_random_plans_never_hang() -> None:
    check_random_plans(range(150, 5000))


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_never_hang(name: str) -> None:
    for ranks, n in ((2, 3), (3, 7), (4, 16)):
        plan = make_plan(name, ranks, n)
        costs = replace(Costs.uniform(plan.num_stages, message=0.1), beside=0.15)
        assert ends_strictly(lower(plan)) and ends_strictly(lower(plan, costs))


def test_the_strict_simulation_sees_a_wrong_order() -> None:
    """Two receives of one channel the wrong way round."""
    program = lower(make_plan("1f1b", 3, 4))
    steps = list(program.ranks[1])
    first, second = (steps.index(Action(1, Op.RECV_FORWARD, i)) for i in (0, 1))
    steps[first], steps[second] = steps[second], steps[first]
    wrong = Program(program.plan, (program.ranks[0], tuple(steps), program.ranks[2]))
    assert not ends_strictly(wrong)
    with pytest.raises(PlanError, match=r"rank 0 sends 1RECV_F0 where rank 1 receives 1RECV_F1"):
        check_program(wrong)


def test_a_plan_that_would_hang_is_refused() -> None:
    ranks = (
        tuple(map(Action.parse, ["0F0", "0B0", "0F1", "0B1"])),
        tuple(map(Action.parse, ["1F0", "1F1", "1B0", "1B1"])),
    )
    with pytest.raises(PlanError, match=r"mine would hang: rank 0 in 0B0, rank 1 in 1F1"):
        lower(Plan("mine", 2, (0, 1), ranks))
