"""The schedules' benchmark, but for its GPUs: figures by hand, rows, goals, a run on the CPU."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import launch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import bench_schedules
from kernel_bench import table as kernel_table
from row_table import measured, row_of
from schedule_bench import executor, goals, rows
from schedule_bench.case import ALONE, Case
from schedule_bench.figures import figures
from schedule_bench.rows import Row

from megalite.parallel.pipeline import Message
from megalite.pipeline.actions import Action, Plan
from megalite.pipeline.schedules import make_plan
from megalite.pipeline.simulate import Span
from megalite.pipeline.trace import Part, RankStep, Trace

EXAMPLES = Path(bench_schedules.__file__).parent

# --- figures of a timeline made by hand ---

PLAN = make_plan("1f1b", 2, 2)
BY_HAND = (
    # Forwards take 1, backwards 2, messages a half. Last: whom it waited for, and how long.
    [("0F0", 0, 1), ("0F1", 1, 2), ("0B0", 5, 7, 1, 3), ("0B1", 8, 10, 1, 1)],
    [("1F0", 1.5, 2.5, 0, 1.5), ("1B0", 2.5, 4.5), ("1F1", 4.5, 5.5), ("1B1", 5.5, 7.5)],
)


def hand_made_trace(plan: Plan = PLAN, spans=BY_HAND, end: float = 12.0) -> Trace:
    """One step from -1 to `end`; a rank's optimizer begins after its last action."""
    ranks = []
    for rank, each in enumerate(spans):
        done = max(span[2] for span in each)
        parts = (
            *(Part("samples", -1, 0), Part("pipeline", 0, done)),
            *(Part("gradient sums", done, done), Part("optimizer", done, end)),
        )
        made = tuple(Span(rank, Action.parse(text), *times) for text, *times in each)
        ranks.append(RankStep(4, parts, made))
    return Trace(plan, {4: tuple(ranks)})


def test_figures_by_hand() -> None:
    found = figures(hand_made_trace())
    assert dataclasses.asdict(found) == pytest.approx(
        dict(
            recorded_s=13,
            # The pipeline takes 10 by its costs, and 3 are outside of it.
            predicted_s=13,
            # Each rank computes for 6, and updates for 2 once both have come to it.
            bubble=1 - 8 / 13,
            span_bubble=0.4,
            bubble_of_1f1b=1 / 3,
            cap=1,
            # Rank 0 waits 3 and 1; rank 1 before its first action only.
            waiting=4 / 2 / 13,
            # Three of the messages were awaited, each half a second after it was sent.
            exposed=1.5 / 2 / 13,
            stage_s=1,
            stage_times="F 1000.00 1000.00, B 2000.00 2000.00 ms",
        )
    )


def test_a_host_that_lags_is_in_the_measured_step_and_not_in_the_prediction() -> None:
    late = [[*BY_HAND[0][:3], ("0B1", 11, 13, 1, 1)], BY_HAND[1]]
    found = figures(hand_made_trace(spans=late, end=15.0))
    # The last message had come before the rank was free to wait for it.
    assert found.recorded_s == 16 and found.predicted_s == pytest.approx(13)
    assert found.exposed == pytest.approx((0.5 + 0.5 + 1) / 2 / 16)


def test_the_cap_of_ranks_that_are_not_alike() -> None:
    quick = [(text, start, (start + end) / 2, *wait) for text, start, end, *wait in BY_HAND[1]]
    found = figures(hand_made_trace(spans=[BY_HAND[0], quick]))
    assert found.cap == pytest.approx(4.5 / 6)
    assert found.stage_s == 0.5 and found.bubble == pytest.approx(1 - 6.5 / 13)


def test_figures_of_one_rank() -> None:
    plan = make_plan("1f1b", 1, 2)
    spans = [[("0F0", 0, 1), ("0B0", 1, 3), ("0F1", 3, 4), ("0B1", 4, 6)]]
    found = figures(hand_made_trace(plan, spans, end=8.0))
    assert found.predicted_s == 9 and found.bubble == pytest.approx(1 / 9)
    assert (found.span_bubble, found.waiting, found.exposed, found.cap) == (0, 0, 0, 1)


# --- the executor's own time ---


def spin(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_what_messages_cost_is_the_executors_time(monkeypatch) -> None:
    right = executor.StubPipeline.start

    def slow(self: executor.StubPipeline, message: Message) -> executor.Arrived:
        spin(3e-4)
        return right(self, message)

    monkeypatch.setattr(executor.StubPipeline, "start", slow)
    own = executor.own_time("1f1b", 2, 4, repeats=5)
    # Of 1F1B on two ranks a computation has one message.
    assert 3e-4 < own.computation_s < 6e-4
    assert own.action_s == pytest.approx(own.computation_s / 2)


def test_what_stages_cost_is_taken_off(monkeypatch) -> None:
    right = executor.StubStage.__call__

    def slow(self: executor.StubStage, *given):
        spin(2e-3)
        return right(self, *given)

    monkeypatch.setattr(executor.StubStage, "__call__", slow)
    own = executor.own_time("zb-v", 2, 4, repeats=5)
    # A third of the computations are forwards.
    assert own.stages_s > 6e-4 and own.computation_s < 3e-4


# --- rows and what is there already ---

WHERE = {"date": "today", "commit": "abc", "device": "2 x CPU", "flags": "--model tiny"}


def row(case: str, step_ms: float = 10.0, **values) -> Row:
    values = {"op": "bubble", "predicted_ms": 10.0, "stage_ms": 6.0} | values
    return Row(case=case, step_ms=step_ms, **values)


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    table = rows.Table(tmp_path / "a.csv", WHERE)
    written = [
        row("1f1b", ranks=2, bubble=-0.0625, note="a, b"),
        Row("bubble", "zb-v", status=rows.FAILED, note="the ranks ended"),
    ]
    for each in written:
        table.add(each)
    assert table.rows() == written
    assert rows.missing(table.rows(), "bubble", ["zb-v", "gpipe", "1f1b"]) == ["gpipe"]
    assert rows.missing(table.rows(), "1b", ["1f1b"]) == ["1f1b"]
    assert list(measured(table.rows(), "bubble")) == ["1f1b"]


def test_rows_of_other_code_or_flags_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows.Table(path, WHERE).add(row("1f1b"))
    assert len(rows.Table(path, WHERE | {"date": "tomorrow"}).rows()) == 1
    for other in ({"commit": "def"}, {"flags": "--model 1b"}, {"device": "2 x H100"}):
        assert rows.Table(path, WHERE | other).rows() == []


def test_another_programs_csv_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        rows.Table(path, WHERE)
    assert path.read_text() == "a,b\n1,2\n"


def test_cells_stand_under_their_heads() -> None:
    shares = ("spread", "bubble", "span_bubble", "bubble_of_1f1b", "cap", "waiting", "exposed")
    others = ("call_us", "memory_gib", "estimate_gib", "tokens_per_s", "loss")
    shown = rows.show(row("1f1b", **dict.fromkeys(shares, 0.05), **dict.fromkeys(others, 9.0)))
    heads = "step ms,spread,/ plan,bubble,span,cap,waits,comm,stage ms,call us,GiB,est.,loss"
    for head in heads.split(","):
        end = rows.HEAD.index(f" {head}") + 1 + len(head)
        assert shown[end - 1] != " " and shown[end : end + 1] in (" ", ""), head
    assert "failed: why" in rows.show(Row("1b", "auto", status=rows.FAILED, note="why"))


# --- goals ---


def verdicts(*given: Row) -> dict[str, bool]:
    return {verdict.goal: verdict.met for verdict in goals.judge(given)}


def test_goals_of_the_bubble() -> None:
    found = verdicts(
        row("1f1b", bubble=0.07, bubble_of_1f1b=1 / 17),
        row("zb-h1", 10.6, bubble=0.036),
        row("zb-v", 9.6, bubble=0.025, stage_ms=4.9),
    )
    assert found == {
        "1f1b: stage >= 5 ms": True,
        "1f1b: within 5% of the prediction": True,
        "zb-h1: stage >= 5 ms": True,
        "zb-h1: within 5% of the prediction": False,
        "zb-v: stage >= 5 ms": False,
        "zb-v: within 5% of the prediction": True,
        "1f1b: bubble within 2 points of (p-1)/(n+p-1)": True,
        "zb-h1: at most half of 1f1b's bubble": False,
        "zb-v: bubble <= 2.5%": True,
    }
    missed = verdicts(row("1f1b", bubble=0.08, bubble_of_1f1b=1 / 17))
    assert not missed["1f1b: bubble within 2 points of (p-1)/(n+p-1)"]


def test_goals_of_the_preset() -> None:
    of = {"op": goals.PRESET, "cap": 0.95, "bubble_of_1f1b": 1 / 17}
    found = verdicts(
        row(ALONE, op=goals.PRESET, tokens_per_s=100.0),
        row("1f1b@8,8", tokens_per_s=88.0, **of),
        row("zb-h1@8,8", tokens_per_s=93.0, **of),
        row("zb-v@4,4,4,4", tokens_per_s=94.0, **of),
        row("1f1b@8.5,7.5", tokens_per_s=91.0, **of),
        row("zb-h2@8.5,7.5", tokens_per_s=97.5, **of),
    )
    assert found == {
        "1f1b, whole layers: >= 98% of cap x n/(n+p-1)": True,
        "best zero-bubble (zb-v@4,4,4,4), whole layers: >= 98% of cap": True,
        "1f1b, half layers: >= 92% of one rank": False,
        "best zero-bubble (zb-h2@8.5,7.5), half layers: >= 97% of one rank": True,
    }
    assert verdicts(row("1f1b@8,8", tokens_per_s=88.0, **of)) == {}, "nothing to compare with"


def test_goal_of_the_executor_and_failed_rows() -> None:
    slow = Row(goals.EXECUTOR, "gpipe", action_us=20.5, computation_us=41.0, stages_us=9.0)
    fast = Row(goals.EXECUTOR, "zb-h1", action_us=19.5, computation_us=32.0, stages_us=9.0)
    failed = Row(goals.BUBBLE, "zb-v", status=rows.FAILED)
    assert list(verdicts(slow, fast, failed).values()) == [False, True]


# --- the command ---


@pytest.mark.parametrize("text", ["1f1b", "interleaved/4", "1f1b@8.5,7.5", "zb-v/2@1,1,2,1"])
def test_a_case_is_read_as_it_is_written(text: str) -> None:
    assert str(Case.parse(text)) == text


def test_the_cases_of_an_op_are_whole_or_halves_as_their_names_say() -> None:
    op = bench_schedules.OPS[goals.PRESET]
    cases = [Case.parse(text) for text in op.cases]
    config = bench_schedules.configuration(op.flags, 2, 5, cases)
    assert config.num_micro_batches == 16 and config.model.seq_length == 4096
    halves = [case for case in op.cases if goals.has_halves(case)]
    assert len(halves) == 4 and all(sum(Case.parse(each).layers) == 16 for each in halves)
    assert Case.parse(ALONE).of(config).world_size == 1


def test_the_default_model_takes_the_arithmetic_that_is_told() -> None:
    op = bench_schedules.OPS[goals.BUBBLE]
    config = bench_schedules.configuration(op.flags, 2, 5, [Case.parse(c) for c in op.cases])
    model = config.model
    layer = model.hidden_size * (
        2 * model.num_attention_heads * model.head_dim
        + 2 * model.num_kv_heads * model.head_dim
        + 3 * model.ffn_hidden_size
    )
    tokens = config.train.micro_batch_size * model.seq_length
    assert (model.num_layers, tokens, config.num_micro_batches) == (8, 4096, 16)
    assert layer == pytest.approx(218e6, rel=2e-3)
    assert 2 * 2 * layer * tokens == pytest.approx(3.6e12, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--cases", "1f1b"], ["--cases and --flags go with --op"]),
        (["--op", "bubble", "--steps", "0"], ["--steps 0: at least 1"]),
        (["--op", "bubble", "--cases", "1f1b@x"], ["interleaved/2 or 1f1b@8.5,7.5"]),
        (
            ["--op", "bubble", "--cases", "zb-x", "1f1b@3,4"],
            ["case zb-x: --schedule zb-x", "case 1f1b@3,4: --pp-layers 3,4 adds up to 7"],
        ),
        (["--op", "bubble", "--csv", "/nowhere/a.csv"], ["/nowhere/a.csv"]),
    ],
)
def test_bad_input_is_told_before_anything_runs(arguments, messages, capsys) -> None:
    assert bench_schedules.main(arguments) == 2
    told = capsys.readouterr().err
    assert all(message in told for message in messages), told


def test_a_case_that_fails_is_told_and_the_next_ones_are_measured(tmp_path, monkeypatch) -> None:
    table = rows.Table(tmp_path / "a.csv", WHERE)
    started: list[list[str]] = []

    def start(op: str, cases: list[Case], config: object, table: rows.Table) -> int:
        started.append([str(case) for case in cases])
        for case in cases:
            if case.schedule == "zb-h1":
                return 1
            table.add(row(str(case)))
        return 0

    monkeypatch.setattr(bench_schedules, "start", start)
    config = SimpleNamespace(parallel=SimpleNamespace(pp=2), num_micro_batches=16)
    cases = [Case(name) for name in ("1f1b", "zb-h1", "gpipe")]
    assert bench_schedules.measure("bubble", cases, config, table) == 1
    assert started == [["1f1b", "zb-h1", "gpipe"], ["gpipe"]]
    assert [each.status for each in table.rows()] == ["ok", "failed", "ok"]
    assert bench_schedules.measure("bubble", cases, config, table) == 1
    assert len(started) == 2, "nothing is measured again"


FLAGS = "--model tiny --num-layers 4 --seq-length 32 --micro-batch-size 1 --global-batch-size 4"


def bench(csv: Path, *arguments: str) -> str:
    words = [*arguments, "--csv", str(csv), "--commit", "abc", "--flags", FLAGS, "--steps", "2"]
    done = launch([sys.executable, str(EXAMPLES / "bench_schedules.py"), *words, "--op", "1b"])
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_on_two_ranks(tmp_path: Path) -> None:
    csv = tmp_path / "a.csv"
    bench(csv, "--cases", ALONE, "zb-v")
    told = bench(csv, "--cases", ALONE, "zb-v", "1f1b@1.5,2.5")
    found = [row_of(Row, each) for each in kernel_table.read(csv)]
    assert [each.case for each in found] == [ALONE, "zb-v", "1f1b@1.5,2.5"]
    assert all(each.case in told for each in found)
    assert "1f1b, half layers: >= 92% of one rank" in told
    alone, v, plain = found
    assert (alone.ranks, v.ranks, plain.micro_batches) == (1, 2, 4)
    # Every schedule computes the same step.
    assert math.isclose(alone.loss, v.loss, rel_tol=1e-5)
    assert math.isclose(alone.loss, plain.loss, rel_tol=1e-5)
    # Of the first rank: with each micro-batch it sends and receives once, in a V twice.
    assert (alone.calls, plain.calls, v.calls) == (0, 8, 16)
    for each in found:
        tokens_per_s = 4 * 32 / each.ranks / (each.step_ms / 1e3)
        assert each.tokens_per_s == pytest.approx(tokens_per_s, rel=1e-3)
        assert each.predicted_ms > 0 and 0 < each.cap <= 1
