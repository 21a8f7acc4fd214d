"""A recorded run written, read back, and put beside its plan; broken files are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import run, violations

from megalite.errors import DataError
from megalite.pipeline.actions import Action
from megalite.pipeline.costs import Costs
from megalite.pipeline.idle import comparison, idle_table, idle_times, parts_table
from megalite.pipeline.picture import Picture, measured, planned
from megalite.pipeline.simulate import Span
from megalite.pipeline.text import parse_plan
from megalite.pipeline.trace import PARTS, Part, RankStep, Trace, mean_costs, traced_steps
from megalite.pipeline.trace_file import rank_file, read_trace, write_plan, write_rank

PLAN = parse_plan("0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1", "mine")


def span(rank: int, action: str, start: float, end: float, peer: int = -1, wait: float = 0) -> Span:
    return Span(rank, Action.parse(action), start, end, peer, wait)


def rank_step(step: int, zero: float, spans: list[Span], *ends: float) -> RankStep:
    """Parts that end at the given times, the first of which begins at `zero`."""
    starts = (zero, *ends)
    parts = [Part(*part) for part in zip(PARTS, starts, ends, strict=False)]
    return RankStep(step, tuple(parts), tuple(spans))


def steps(number: int, zero: float, slow: float = 1.0) -> tuple[RankStep, RankStep]:
    """A step of two ranks: messages take 1, forwards 2, backwards 4 on rank 0 and 3 on rank 1."""
    first = [
        span(0, "0F0", zero + 1, zero + 3),
        span(0, "0F1", zero + 3, zero + 5),
        span(0, "0B0", zero + 10, zero + 14, 1, 5),
        span(0, "0B1", zero + 15, zero + 19, 1, 0.5),
    ]
    second = [
        span(1, "1F0", zero + 4, zero + 6, 0, 3.5),
        span(1, "1B0", zero + 6, zero + 9),
        span(1, "1F1", zero + 9, zero + 11, 0, 0),
        span(1, "1B1", zero + 11, zero + 14),
    ]
    return (
        rank_step(number, zero, first, zero + 1, zero + 19, zero + 20, zero + 21 * slow),
        rank_step(number, zero + 0.5, second, zero + 0.5, zero + 14, zero + 20, zero + 21 * slow),
    )


TRACE = Trace(PLAN, {3: steps(3, 100.0), 4: steps(4, 200.0, 1.5), 5: steps(5, 300.0, 1.2)})


def write(folder: Path) -> None:
    write_plan(folder, PLAN)
    for rank in range(2):
        write_rank(folder, PLAN, rank, "cpu", [step[rank] for step in TRACE.steps.values()])


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write(tmp_path)
    read = read_trace(tmp_path)
    assert read.steps == TRACE.steps
    assert read.plan.ranks == PLAN.ranks
    lines = [json.loads(line) for line in rank_file(tmp_path, 0).read_text().splitlines()]
    assert lines[0] == {"rank": 0, "ranks": 2, "device": "cpu"}
    message = {"waited": 5.0, "waits_for": 1, "message": "0RECV_B0"}
    assert lines[7] == {"step": 3, "action": "0B0", "start": 110.0, "end": 114.0, **message}
    assert [p.name for p in sorted((tmp_path / "trace").iterdir())] == [
        *("plan.txt", "rank-00000.jsonl", "rank-00001.jsonl")
    ]


def test_a_timeline_begins_where_the_first_rank_begins_its_pipeline() -> None:
    timeline = TRACE.timeline(3)
    assert TRACE.start(3) == 100.5
    assert timeline.spans[0] == span(0, "0F0", 0.5, 2.5)
    assert timeline.makespan == 18.5
    assert timeline.bubble() == pytest.approx(1 - 22 / 37)
    assert TRACE.step_time(3) == 21.0
    assert TRACE.typical_step() == 5


def test_costs_are_means_and_a_message_takes_what_its_receiver_waited_for() -> None:
    costs = TRACE.costs()
    assert costs.forward == (2.0, 2.0)
    assert costs.backward == (4.0, 3.0)
    assert (costs.input_gradient, costs.weight_gradient) == ((0.0, 0.0), (0.0, 0.0))
    assert costs.message == pytest.approx(1.0)
    twice = [rank.spans for rank in steps(3, 0.0)] + [rank.spans for rank in steps(4, 7.0)]
    assert mean_costs(PLAN, twice) == costs


def test_costs_of_split_backwards_add_up() -> None:
    plan = parse_plan("0F0 0I0 0W0", "split")
    spans = [span(0, "0F0", 0, 1), span(0, "0I0", 1, 3), span(0, "0W0", 3, 3.5)]
    costs = mean_costs(plan, [spans])
    assert costs == Costs.uniform(1, forward=1.0, input_gradient=2.0, weight_gradient=0.5)


def test_idle_time_is_told_by_the_rank_that_was_waited_for() -> None:
    first, second = idle_times(TRACE.timeline(3))
    assert (first.computing, first.start, first.end) == (12.0, 0.5, 0.0)
    assert first.waits == {1: 5.5}
    assert first.between == pytest.approx(0.5)  # the backward began a half before its message came
    assert (second.computing, second.start, second.end) == (10.0, 3.5, 5.0)
    assert second.waits == {0: 0.0}
    assert second.between == 0.0


def test_idle_times_add_up_to_the_makespan() -> None:
    picture = planned(PLAN, Costs.uniform(2, forward=1.5, message=0.25))
    for idle in idle_times(picture.timeline):
        parts = (idle.computing, idle.start, idle.end, idle.between, *idle.waits.values())
        assert sum(parts) == pytest.approx(picture.timeline.makespan)
        assert idle.between == pytest.approx(0.0, abs=1e-9), "a simulated rank only waits"


def pictures() -> tuple[Picture, Picture]:
    plan = planned(PLAN, TRACE.costs(), "planned", in_seconds=True)
    return plan, measured(TRACE, 3, "measured")


def test_run_beside_plan() -> None:
    plan, run = pictures()
    assert plan.timeline.makespan == 18.0
    assert comparison(TRACE, 3, plan, run) == [
        "pipeline     measured 18.5 s, predicted 18 s, ratio 1.028; in the mean of 3 steps "
        "measured 18.5 s, ratio 1.028",
        "step         measured 21 s, predicted 20.5 s, ratio 1.024; 2.5 s of both is outside of "
        "the pipeline, as measured",
        "idle         42.9% of the step, the optimizer not counted as idle",
        "balance cap  91.7%: mean rank's computation by that of the slowest",
    ]


def test_tables() -> None:
    table = idle_table(pictures()).splitlines()
    assert [line.split() for line in table] == [
        ["rank", "computing", "start", "end", "between", "waiting", "for"],
        ["0", "planned", "66.7%", "0.0%", "0.0%", "0.0%", "rank", "1", "33.3%"],
        ["0", "measured", "64.9%", "2.7%", "0.0%", "2.7%", "rank", "1", "29.7%"],
        ["1", "planned", "55.6%", "16.7%", "27.8%", "0.0%", "nobody"],
        ["1", "measured", "54.1%", "18.9%", "27.0%", "0.0%", "rank", "0", "0.0%"],
    ]
    assert [line.split() for line in parts_table(TRACE, 3).splitlines()][1:] == [
        ["0", "1000.000", "18000.000", "1000.000", "1000.000"],
        ["1", "0.000", "13500.000", "6000.000", "1000.000"],
    ]


def test_a_measured_picture_has_what_lies_around_the_pipeline() -> None:
    _, run = pictures()
    assert run.parts[0] == (0, Part("samples", -0.5, 0.5))
    assert run.parts[-1] == (1, Part("optimizer", 19.5, 20.5))
    assert {part.name for _, part in run.parts} == set(PARTS) - {"pipeline"}


def replaced(rank: int, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = rank_file(folder, rank)
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda f: rank_file(f, 1).unlink(), "rank-00001.jsonl: No such file"),
        (lambda f: (f / "trace/plan.txt").unlink(), "plan.txt: No such file .* --trace-steps N"),
        (lambda f: (f / "trace/plan.txt").write_text("0F0 0X0"), "line 1: '0X0' is not an action"),
        (lambda f: (f / "trace/plan.txt").write_text("0F0 0F1 0B0"), "0B1 is missing"),
        (lambda f: (f / "trace/plan.txt").write_bytes(b"\xff"), "plan.txt: it is not text"),
        (replaced(0, '"rank": 0', '"rank": 1'), "rank-00000.jsonl, line 1: expected rank 0 of 2"),
        (replaced(1, '"action": "1B0"', '"action": "B0"'), "line 7: 'B0' is not an action"),
        (replaced(1, '"action": "1B0"', '"action": "1B1"'), "step 3 has other actions than rank 1"),
        (replaced(0, '"part": "optimizer"', '"part": "rest"'), "step 3 has the parts"),
        (replaced(0, '"end": 103.0', '"stop": 103.0'), "line 6: 'end' is missing"),
        (replaced(0, '"start": 103.0', '"start": []'), "line 7: "),
        (replaced(0, "{", "["), "line 1: "),
        (lambda f: write_rank(f, PLAN, 0, "cpu", []), r"different steps: rank 0: none; rank 1: 3,"),
    ],
)
def test_a_broken_trace_is_refused(
    tmp_path: Path, change: Callable[[Path], object], told: str
) -> None:
    write(tmp_path)
    change(tmp_path)
    with pytest.raises(DataError, match=told):
        read_trace(tmp_path)


def test_what_is_wrong_with_all_ranks_is_told_at_once(tmp_path: Path) -> None:
    write(tmp_path)
    rank_file(tmp_path, 0).unlink()
    rank_file(tmp_path, 1).write_text("no record\n")
    with pytest.raises(DataError) as caught:
        read_trace(tmp_path)
    assert len(caught.value.violations) == 2


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            "--steps 5 --trace-steps 4",
            "--trace-steps 4 records steps 4 to 7, but there are 5; try --trace-steps 2 or "
            "--steps 7 or more",
        ),
        (
            "--steps 3 --trace-steps 1",
            "--trace-steps 1 records step 4, but there are 3; try --steps 4 or more",
        ),
        ("--trace-steps -1", "--trace-steps -1 must not be negative"),
        (
            "--steps 50 --trace-steps 9 --micro-batch-size 2 --global-batch-size 8 "
            "--rampup-batch-size 2,2,60",
            "--trace-steps 9 records steps 4 to 12, among which the batch grows: they have no plan "
            "in common; try --trace-steps 7, or leave --rampup-batch-size out",
        ),
    ],
)
def test_steps_that_cannot_be_recorded_are_refused(flags: str, told: str) -> None:
    assert violations(*flags.split()) == [told]


@pytest.mark.parametrize(
    "flags",
    [
        "--steps 7 --trace-steps 4",
        "--trace-steps 0 --steps 1",
        "--trace-steps 7 --steps 50 --micro-batch-size 2 --global-batch-size 8 "
        "--rampup-batch-size 2,2,60",
    ],
)
def test_steps_that_can_be_recorded(flags: str) -> None:
    run(*flags.split())


def test_steps_begin_after_the_warm_up() -> None:
    assert list(traced_steps(2)) == [4, 5]
    assert not traced_steps(0)
