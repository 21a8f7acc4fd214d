"""A plan's text reads back as the same plan; what is wrong with one is told with its line."""

from __future__ import annotations

import pytest

from megalite.pipeline.actions import COMPUTE, Action, Op, PlanError
from megalite.pipeline.check import check_plan
from megalite.pipeline.lower import lower
from megalite.pipeline.schedules import SCHEDULES, make_plan
from megalite.pipeline.text import parse_plan, plan_text


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_plan_reads_back(name: str) -> None:
    for ranks, micro_batches in ((1, 1), (2, 5), (3, 12)):
        plan = make_plan(name, ranks, micro_batches)
        assert parse_plan(plan_text(plan), name) == plan


def test_every_action_of_a_program_reads_back() -> None:
    steps = [step for steps in lower(make_plan("zb-v", 3, 4)).ranks for step in steps]
    assert {step.op for step in steps} == set(Op) - {Op.BACKWARD}
    assert [Action.parse(str(step)) for step in steps] == steps
    assert str(Action(1, Op.RECV_BACKWARD, 12)) == "1RECV_B12"


@pytest.mark.parametrize("word", ["F", "1X2", "1F", "-1F2", "1f2", "1F2F", "", "1.0F2"])
def test_words_that_are_no_action(word: str) -> None:
    with pytest.raises(ValueError, match="is not an action such as"):
        Action.parse(word)


def test_a_plan_written_by_hand() -> None:
    plan = parse_plan("# mine\n\n0F0,0F1 , 0B0,,0B1  # first\n 1F0 1I0 1F1\t1B1 1W0\n", "mine")
    assert plan.stage_rank == (0, 1)
    assert plan.num_micro_batches == 2
    assert [" ".join(map(str, order)) for order in plan.ranks] == [
        "0F0 0F1 0B0 0B1",
        "1F0 1I0 1F1 1B1 1W0",
    ]
    check_plan(plan)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no action stands in it"),
        ("# nothing\n", "no action stands in it"),
        ("0F0 0B0\n1F0 1b0\n", "line 2: '1b0' is not an action such as 2F0"),
        ("0F0 0SEND_F0 0B0\n", "line 1: 0SEND_F0 is a message; a plan names computations"),
        ("0F0 0B0\n\n0F1 0B1\n", "line 3: 0F1 stands on rank 1, but its stage on rank 0"),
        ("0F0 0B0\n2F0 2B0\n", "stage 1 is missing, but stage 2 is there"),
        ("0F0 0B0 0F2 0B2\n", "micro-batch 1 is missing, but micro-batch 2 is there"),
        ("0F99999999999 0F0\n", "micro-batch 1 is missing, but micro-batch 99999999999 is there"),
        ("99999999999F0 0F0\n", "stage 1 is missing, but stage 99999999999 is there"),
    ],
)
def test_what_is_wrong_is_told(text: str, complaint: str) -> None:
    with pytest.raises(PlanError, match=complaint):
        parse_plan(text, "mine.txt")


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(PlanError, match=r"plan mine.txt: line 1: 'x'.*line 2: 'y'.*stage 0 is"):
        parse_plan("x 1F0\ny\n", "mine.txt")


def test_a_plan_names_all_computations() -> None:
    assert [op.value for op in COMPUTE] == ["F", "B", "I", "W"]
