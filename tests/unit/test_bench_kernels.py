from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import bench_kernels
from kernel_bench import (
    goals,
    measure,
    problem,
    rivals,
    rivals_megatron,
    rivals_ours,
    rivals_torch,
    table,
    timing,
    vocab_parallel,
)
from kernel_bench.op import Op, size_text
from kernel_bench.problem import BACKWARD, BOTH, FORWARD, STEP, UnsupportedError, largest_error
from kernel_bench.rivals import Rival
from kernel_bench.table import Line
from kernel_bench.timing import Launch, Times

CPU = torch.device("cpu")
OPS = bench_kernels.OPS
SMALL = [(op, direction) for op in OPS for direction in op.directions]


def row(contestant: str, ms: float | None = None, **values) -> Line:
    values = {"op": "rms_norm", "size": "8192x2048", "direction": BOTH} | values
    return Line(contestant=contestant, ms=ms, **values)


def named(op: Op | str) -> str:
    return op.name if isinstance(op, Op) else str(op)


# --- contestants are right, and wrong ones are found ---


def error_of(build, op: Op, direction: str) -> float:
    given = op.make(op.parse(op.small), direction, CPU, torch.float32)
    expected = list(op.expected(given))
    prepared = build(given)
    results = prepared.run()
    for result in results:
        assert result.isfinite().all()
    error = largest_error(results, expected)
    if prepared.restore is not None:
        prepared.restore()
    if direction != STEP and prepared.restore is not None:
        assert largest_error(prepared.run(), expected) == pytest.approx(error, rel=0.1, abs=1e-6)
    return error


@pytest.mark.parametrize(("op", "direction"), SMALL, ids=named)
def test_torch_is_right_by_the_reference(op: Op, direction: str):
    assert error_of(rivals_torch.build, op, direction) < 1e-5


@pytest.mark.parametrize(("op", "direction"), SMALL, ids=named)
def test_ours_is_right_by_the_reference(op: Op, direction: str):
    assert error_of(rivals_ours.build, op, direction) < 1e-4


@pytest.mark.parametrize("name", ["ours-main", "ours-unfused"])
def test_our_other_forms_of_one_op_are_right_by_the_reference(name: str):
    (rival,), _ = rivals.found([name])
    op = bench_kernels.op_named("linear_cross_entropy")
    assert error_of(rival.build, op, BOTH) < 1e-4
    with pytest.raises(UnsupportedError, match="linear_cross_entropy only"):
        error_of(rival.build, bench_kernels.op_named("swiglu"), BOTH)


def test_a_wrong_contestant_is_found():
    op = bench_kernels.op_named("rms_norm")
    given = op.make((8, 64), BOTH, CPU, torch.float32)
    y, dx, dw = rivals_torch.build(given).run()
    assert largest_error((y, dx, dw), op.expected(given)) < 1e-5
    assert largest_error((y, dx, 2 * dw), op.expected(given)) == pytest.approx(1, abs=1e-3)
    y[3, 5] = torch.nan
    assert not largest_error((y, dx, dw), op.expected(given)) <= op.tolerance
    with pytest.raises(ValueError, match="result 1 is"):
        largest_error((dx, dw), op.expected(given))


def test_a_backward_alone_is_the_gradients():
    op = bench_kernels.op_named("softmax_scaled")
    given = op.make((2, 8, 16), BACKWARD, CPU, torch.float32)
    run = rivals_torch.build(given).run
    first, second = run(), run()
    assert len(first) == 1 and torch.equal(first[0], second[0])


def test_an_op_that_writes_into_its_leaf_gets_one_behind_an_identity():
    given = problem.Problem("x", BOTH, (4,), {"x": torch.ones(4)}, ("x",), (torch.ones(4),))
    run = problem.call(given, lambda tensors: (tensors["x"].mul_(3),), entrance=True)
    result, gradient = run()
    assert result.tolist() == [3] * 4 and gradient.tolist() == [3] * 4


def test_what_a_rival_lacks_is_said():
    op = bench_kernels.op_named("cross_entropy")
    given = op.make((4, 16), BOTH, CPU, torch.float32)
    with pytest.raises(UnsupportedError, match="vocab_parallel"):
        rivals_megatron.build(given)
    here, absent = rivals.found(["ours", "apex"])
    assert [rival.name for rival in here] == ["ours"]
    assert "amp_C" in absent["apex"]


# --- a row, on a clock that takes no time ---


class Stream:
    def synchronize(self) -> None:
        pass


class StillClock:
    """In place of the GPU's: the first launch takes 1 ms, the second 2, and so on."""

    device = CPU
    stream = Stream()

    def new_row(self) -> None:
        pass

    def poison(self, size: int) -> None:
        pass

    def launch(self, prepared: problem.Prepared) -> Launch:
        prepared.run()
        return Launch(prepared.run, prepared.restore, "")

    def peak_bytes(self, _prepared: problem.Prepared) -> int:
        return 10

    def copy(self, total_bytes: int) -> problem.Prepared:
        return problem.Prepared(lambda: (torch.empty(total_bytes),))

    def rounds(self, launches: dict) -> dict[str, Times]:
        return {name: Times(i + 1.0, i + 0.5, i + 1.5) for i, name in enumerate(launches)}


@pytest.fixture
def still_clock(monkeypatch) -> StillClock:
    monkeypatch.setattr(measure, "settle", lambda clock: None)
    return StillClock()


def doubled(given: problem.Problem) -> problem.Prepared:
    right = rivals_torch.build(given)
    return problem.Prepared(lambda: tuple(2 * result for result in right.run()))


def refusing(given: problem.Problem) -> problem.Prepared:
    raise UnsupportedError("not today")


RIVALS = [
    Rival("ours", "", rivals_ours.build),
    Rival("liger", "1", doubled),
    Rival("quack", "1", refusing),
    Rival("torch", "2", rivals_torch.build, compiles=True),
]


@pytest.mark.parametrize("name", ["swiglu", "cross_entropy", "adamw"])
def test_a_row_times_who_is_right(name: str, still_clock: StillClock):
    op = bench_kernels.op_named(name)
    op = dataclasses.replace(op, check=lambda size: (1024,)) if name == "adamw" else op
    lines = measure.measure(op, op.parse(op.small), op.directions[-1], RIVALS, still_clock)
    by_name = {line.contestant: line for line in lines}
    assert [(line.contestant, line.status, line.ms) for line in lines] == [
        ("ours", table.MEASURED, 1.0),
        ("liger", table.WRONG, None),
        ("quack", table.ABSENT, None),
        ("torch", table.MEASURED, 2.0),
        ("copy", table.MEASURED, 3.0),
    ]
    assert by_name["liger"].error == pytest.approx(1, abs=0.1)
    assert by_name["quack"].note == "not today"
    assert by_name["torch"].ours == 2 and by_name["torch"].compile_s is not None
    assert by_name["ours"].percent_of_copy == pytest.approx(300)


def test_host_time_of_a_row(still_clock: StillClock):
    op = bench_kernels.op_named("swiglu")
    lines = {line.contestant: line for line in measure.measure_host(op, RIVALS, still_clock)}
    assert lines["ours"].host_us > 0 and lines["torch"].over_torch_us == 0
    assert lines["quack"].status == table.ABSENT


def test_a_compilation_is_cut_off():
    def endless():
        with timing.limit(0.05):
            while True:
                pass

    with pytest.raises(timing.TooLongError, match=r"over 0\.05 s"):
        endless()
    wrapped = RuntimeError(f"backend raised:\nTooLongError: {timing.TooLongError.TEXT} 45 s")
    assert measure.reason(wrapped) == "compilation took over 45 s"


def test_the_spread_of_times():
    assert timing.spread([5.0, 1.0, 4.0, 2.0, 3.0]) == Times(3.0, 2.0, 4.0)


def test_the_largest_error_of_processes_is_nan_if_one_is():
    assert math.isnan(vocab_parallel.worst_of([1e-3, math.nan]))
    assert vocab_parallel.worst_of([1e-3, 2e-3]) == 2e-3


# --- bytes and percentages ---


@pytest.mark.parametrize(
    ("name", "size", "direction", "each"),
    [
        ("rms_norm", "8192x4096", FORWARD, 4),
        ("rms_norm", "8192x4096", BOTH, 10),
        ("add_rms_norm", "8192x4096", FORWARD, 8),
        ("add_rms_norm", "8192x4096", BOTH, 16),
        ("softmax_scaled", "64x2048x2048", FORWARD, 4),
        ("softmax_scaled", "64x2048x2048", BACKWARD, 6),
        ("softmax_masked", "64x2048x2048", FORWARD, 4 + 1 / 64),
        ("softmax_causal", "64x2048x2048", FORWARD, 3),
        ("softmax_causal", "64x2048x2048", BOTH, 7),
        ("swiglu", "8192x14336", BOTH, 16),
        ("cross_entropy", "8192x32000", BOTH, 4),
        ("adamw", "1000000", STEP, 30),
    ],
)
def test_floor_bytes_of_an_element(name: str, size: str, direction: str, each: float):
    op = bench_kernels.op_named(name)
    numbers = op.parse(size)
    assert op.floor(numbers, direction).total == pytest.approx(each * math.prod(numbers), rel=2e-3)


def test_floor_bytes_of_rope():
    tokens, turned, values = 4 * 4096, 40 * 128, 8 * 128
    size = (4, 4096, 32, 8, 128)
    both = bench_kernels.op_named("rope_half").floor(size, BOTH).total
    assert both == pytest.approx(8 * tokens * turned, rel=0.01)
    packed = bench_kernels.op_named("rope_packed_half").floor(size, BOTH).total
    assert packed == pytest.approx(both + 4 * tokens * values)


def test_percentages():
    line = row("ours", 0.5, floor_bytes=1_508_000_000, copy_ms=0.4)
    assert line.gbps == pytest.approx(3016)
    assert line.percent_of_copy == pytest.approx(80)
    assert line.percent_of_reference == pytest.approx(100)
    assert row("ours").gbps is None and row("ours").percent_of_copy is None


# --- the CSV and the printed lines ---


def test_rows_are_appended_under_one_header(tmp_path: Path):
    path = tmp_path / "figures.csv"
    record = bench_kernels.Recorder(path, {"commit": "abc", "card": "H200"}, {"liger": "0.8.5"})
    record([row("ours", 0.5, floor_bytes=10**9, copy_ms=0.4), row("liger", 0.75)])
    record([row("ours", status=table.WRONG, error=math.nan)])
    rows = table.read(path)
    assert [each["contestant"] for each in rows] == ["ours", "liger", "ours"]
    assert rows[0]["percent_of_copy"] == "80" and rows[0]["commit"] == "abc"
    assert rows[1]["version"] == "0.8.5" and rows[1]["percent_of_copy"] == ""
    assert rows[2]["status"] == "WRONG" and rows[2]["error"] == "nan"
    assert len(record.lines) == 3


def test_another_programs_csv_is_left_alone(tmp_path: Path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        table.append(path, [table.record(row("ours"), {})])
    with pytest.raises(bench_kernels.UsageError, match="other columns"):
        bench_kernels.check_csv(path, {})
    assert path.read_text() == "a,b\n1,2\n"


def test_lines_stand_in_columns():
    full = row("ours", 0.5, p20=0.49, p80=0.51, floor_bytes=10**9, copy_ms=0.4, error=1e-3, ours=1)
    for column in ("ms", "GB/s", "% copy", "/ ours", "error"):
        end = table.HEAD.index(column) + len(column)
        assert table.show(full)[end - 1] != " ", column
    assert "not right" in table.show(row("liger", status=table.WRONG, error=0.3, note="not right"))
    host = row("ours", host_us=70.0, over_torch_us=20.0, direction=table.HOST)
    assert table.show(host).split() == ["ours", "70.0", "20.0"]


# --- goals ---


def test_goals_met_and_missed():
    lines = [
        row("ours", 1.0, floor_bytes=10**9, copy_ms=0.9),
        row("quack", 1.04),
        row("liger", 2.0),
        row("compile-max", status=table.ABSENT, note="compilation took over 45 s"),
    ]
    verdicts = goals.judge(lines)
    assert [(verdict.met, verdict.found) for verdict in verdicts] == [
        (True, "90.0%"),
        (False, "1.040 x quack"),
    ]
    text = "\n".join(goals.summary(verdicts))
    assert "goals met: 1 of 2" in text
    assert "missed: rms_norm 8192x2048 forward+backward: 1.05 x" in text


def test_a_goal_without_rivals_or_ours_is_not_told():
    alone = goals.judge([row("ours", 1.0, op="swiglu", floor_bytes=10**9, copy_ms=1.0)])
    assert [verdict.met for verdict in alone] == [True, None, None]
    absent = goals.judge([row("ours", status=table.WRONG, note="error 1")])
    assert [verdict.met for verdict in absent] == [None]


def test_memory_and_host_goals():
    loss = {"op": "cross_entropy", "floor_bytes": 10**9, "copy_ms": 1.0, "memory_bytes": 2**21}
    verdicts = goals.judge([row("ours", 1.0, **loss)])
    assert [v.met for v in verdicts if v.goal == "no extra memory"] == [False]
    host = {"op": "swiglu", "size": "64x128", "direction": table.HOST}
    ours, torchs = row("ours", host_us=100.0, **host), row("torch", host_us=50.0, **host)
    lines = measure.host_ratios({"ours": ours, "torch": torchs})
    assert [verdict.met for verdict in goals.judge(list(lines.values()))] == [False, True]


def test_every_row_of_the_table_has_a_goal():
    for case in bench_kernels.table_cases():
        size = size_text(case.size) or "1"
        line = dataclasses.replace(
            row("ours", 1.0, floor_bytes=1, copy_ms=1.0, tflops=1.0),
            op=case.op,
            size=size,
            direction=case.direction,
            host_us=1.0 if case.direction == table.HOST else None,
        )
        assert goals.judge([line]), case


# --- the command line ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--table"),
        (["--op", "gelu"], "choose of rms_norm"),
        (["--op", "rms_norm", "--sizes", "8192"], "ROWSxHIDDEN, for instance 64x256"),
        (["--op", "rms_norm", "--sizes", "0x64"], "not a size"),
        (["--op", "vocab_parallel_cross_entropy", "--sizes", "8x7"], "both even"),
        (["--op", "host", "--sizes", "8x8"], "--sizes"),
        (["--table", "--op", "rope_half"], "leave out"),
        (["--table", "--part", "3/2"], "1 <= K <= N"),
        (["--part", "1/2"], "--table"),
        (["--table", "--rivals", "ours,unsloth"], "unsloth; choose of ours"),
        (["--plot", "x.png", "--csv", "/nowhere/x.csv"], "--plot"),
    ],
)
def test_bad_input_is_one_message(arguments: list[str], message: str, capsys):
    assert bench_kernels.main(arguments) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_says_so(capsys):
    assert bench_kernels.main(["--table", "--rivals", "ours"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_parts_are_the_table():
    whole = bench_kernels.table_cases()
    halves = [bench_kernels.part(whole, f"{k}/2") for k in (1, 2)]
    assert sorted(halves[0] + halves[1]) == sorted(whole)
    assert len(set(whole)) == len(whole)


def test_the_table_compiles_in_one_mode(capsys):
    here, _ = rivals.found(["ours", "compile", "compile-max"])
    names = {
        op: [rival.name for rival in bench_kernels.taking_part(here, op, True)]
        for op in ("rms_norm", "swiglu")
    }
    assert names == {"rms_norm": ["ours", "compile-max"], "swiglu": ["ours", "compile"]}


def test_list(capsys):
    assert bench_kernels.main(["--list", "--rivals", "ours,torch"]) == 0
    told = capsys.readouterr().out
    assert all(op.name in told for op in OPS)
