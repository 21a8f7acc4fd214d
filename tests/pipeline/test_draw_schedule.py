"""The tool: it prints what it was asked for and takes it back; bad input is told at once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from runs import ROOT, load_tool

from megalite.errors import ConfigError
from megalite.pipeline.actions import Action
from megalite.pipeline.costs import Costs
from megalite.pipeline.schedules import SCHEDULES, make_plan
from megalite.pipeline.simulate import Span
from megalite.pipeline.text import parse_plan
from megalite.pipeline.trace import PARTS, Part, RankStep
from megalite.pipeline.trace_file import write_plan, write_rank

Draw = Callable[[str], str]


@pytest.fixture
def draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Draw:
    """What the tool prints for some words, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(words: str) -> str:
        assert load_tool("draw_schedule").main(words.split()) == 0
        return capsys.readouterr().out

    return run


def refused(words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_tool("draw_schedule").main(words.split())
    return caught.value.violations


def test_without_flags_it_draws_in_the_terminal(draw: Draw) -> None:
    lines = draw("").splitlines()
    assert lines[0] == "1f1b, 4 ranks, 8 micro-batches (F forward, B backward, · idle)"
    assert lines[2].startswith("rank 0   F0 F1 F2 F3 ···")
    assert lines[-3:] == [
        "makespan     33",
        "bubble       27.3% of all ranks' time; 27.3% of the idlest rank's, first action to last",
        "peak memory  4 3 2 1 by rank, in one micro-batch's activations on one stage",
    ]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_printed_actions_are_the_plan_and_are_taken_back(draw: Draw, schedule: str) -> None:
    size = f"--schedule {schedule} --pp 2 --micro-batches 5"
    text = draw(f"{size} --format actions")
    plan = make_plan(schedule, 2, 5)
    read = parse_plan(text, schedule)
    assert (read.ranks, read.stage_rank) == (plan.ranks, plan.stage_rank)
    assert draw(f"{size} --format actions --output mine.txt") == ""
    assert draw("--schedule mine.txt --format actions").splitlines()[1:] == text.splitlines()[1:]
    drawn = draw(f"{size}").splitlines()
    assert draw("--schedule mine.txt").splitlines()[1:] == drawn[1:]


def test_costs_decide_where_weight_gradients_go(draw: Draw) -> None:
    words = "--schedule zb-h1 --pp 4 --micro-batches 8 --format actions"
    costs = {"forward": 1.0, "input_gradient": 1.5, "weight_gradient": 0.25, "message": 0.5}
    given = draw(f"{words} --costs input=1.5,weight=0.25,message=0.5")
    plan = make_plan("zb-h1", 4, 8, costs=Costs.uniform(4, **costs))
    assert parse_plan(given, "zb-h1").ranks == plan.ranks
    assert given != draw(words)


def test_other_formats(draw: Draw) -> None:
    svg = ElementTree.fromstring(draw("--pp 2 --micro-batches 3 --format svg"))
    assert len([e for e in svg.iter() if e.get("class") == "action"]) == 12
    events = json.loads(draw("--pp 2 --micro-batches 3 --format perfetto"))["traceEvents"]
    assert len([e for e in events if e["ph"] == "X" and e["cat"] in ("forward", "backward")]) == 12


def test_chunks(draw: Draw) -> None:
    text = draw("--schedule interleaved --pp 2 --micro-batches 4 --chunks 3 --format actions")
    assert parse_plan(text, "x").stage_rank == (0, 1, 0, 1, 0, 1)


def recorded(number: int, late: float) -> tuple[RankStep, RankStep]:
    """Two ranks' step in which rank 0's backward is late."""
    spans = (
        (
            Span(0, Action.parse("0F0"), 1, 3),
            Span(0, Action.parse("0B0"), 11 + late, 15 + late, 1, 8 + late),
        ),
        (Span(1, Action.parse("1F0"), 4, 6, 0, 3), Span(1, Action.parse("1B0"), 6, 10)),
    )
    times = (0.0, 1.0, 16.0, 17.0, 18.0 + late)
    parts = tuple(Part(name, *times[i : i + 2]) for i, name in enumerate(PARTS))
    return RankStep(number, parts, spans[0]), RankStep(number, parts, spans[1])


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A run's folder with three recorded steps."""
    plan = parse_plan("0F0 0B0\n1F0 1B0", "mine")
    steps = [recorded(3, 0.0), recorded(4, 1.0), recorded(5, 0.5)]
    write_plan(tmp_path / "run", plan)
    for rank in range(2):
        write_rank(tmp_path / "run", plan, rank, "cpu", [each[rank] for each in steps])
    return "run"


def test_a_run_is_drawn_beside_its_plan(draw: Draw, run: str) -> None:
    lines = draw(f"--trace {run}").splitlines()
    assert lines[:7] == [
        "planned, by the measured times of 2 stages (F forward, B backward, · idle)",
        "rank 0   F0 ············B0--- ",
        "rank 1   ····F0- B0--- ·······",
        "",
        "measured, step 5",
        "rank 0   F0 ·············B0--- ",
        "rank 1   ····F0- B0--- ········",
    ]
    text = "\n".join(lines)
    assert "pipeline     measured 14.5 s, predicted 14 s, ratio 1.036; in the mean of" in text
    assert "step         measured 18.5 s, predicted 18 s, ratio 1.028" in text


def test_a_step_of_a_run_in_other_formats(draw: Draw, run: str) -> None:
    assert "measured, step 3" in draw(f"--trace {run} --step 3")
    svg = ElementTree.fromstring(draw(f"--trace {run} --step 3 --format svg"))
    assert len([e for e in svg.iter() if e.get("class") == "action"]) == 8
    events = json.loads(draw(f"--trace {run} --format perfetto"))["traceEvents"]
    processes = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert processes == ["planned", "measured"]
    assert draw(f"--trace {run} --format actions").splitlines()[1:] == ["0F0 0B0", "1F0 1B0"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--schedule 1F1B", ["--schedule 1F1B: there is no such schedule or file; did you mean"]),
        ("--schedule zb-v --chunks 3", ["--chunks 3: --schedule zb-v has always 2 stages on"]),
        ("--chunks -1", ["--chunks -1 must be above 0, or 0"]),
        ("--pp 0 --micro-batches -2", ["--pp 0 must be above 0", "--micro-batches -2 must be"]),
        ("--pp 400 --micro-batches 4000", ["1,600,000 forwards are too many to draw"]),
        ("--costs forward=0,message=-1", ["forward=0 must be above 0", "message=-1 must be at"]),
        ("--costs a=1,weight,input=x,message=inf", ["'a' is unknown", "weight: expected NAME=TIME",
         "input=x: expected a number", "message=inf must be at least 0 and finite"]),
        ("--format gif --step 3", ["--format gif is unknown", "--step 3 has no effect without"]),
        ("--output nowhere/x.svg", ["there is no folder nowhere"]),
        ("--output .", ["--output . is a folder"]),
        ("--trace nothing --pp 2", ["--pp 2 has no effect with --trace", "nothing/trace/plan.txt"]),
        ("--trace run --step 9", ["--step 9 is not in the trace; there are 3, 4, 5"]),
        ("--schedule missing.txt", ["--schedule missing.txt: there is no such schedule or file"]),
        ("--schedule run/trace/plan.txt --chunks 2", ["--chunks 2 has no effect with a file of"]),
        ("--schedule .", ["--schedule . is a folder; give a file of actions, or one of gpipe"]),
        ("--schedule auto", ["--schedule auto is chosen for a run"]),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("draw", "run")
def test_bad_input(words: str, told: list[str]) -> None:
    violations = refused(words)
    assert len(violations) == len(told)
    for violation, expected in zip(violations, told, strict=True):
        assert expected in violation


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "0F0 0X0\n1F0 1SEND_B0",
            "line 1: '0X0' is not an action .* line 2: 1SEND_B0 is a message",
        ),
        ("# mine\n\n0F0 0B0\n1B0 1F0", r"rank 1 \(line 4\): 1B0 stands before 1F0"),
        ("0F0 0F1 0B0 0B1\n1F0 1B0 1F1", r"rank 1 \(line 2\): 1B1 is missing"),
        (
            "0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1",
            r"would hang: rank 0 \(line 1\) in 0B0, rank 1 \(line 2\) in 1F1",
        ),
    ],
)
@pytest.mark.usefixtures("draw")
def test_a_wrong_file_of_actions_is_refused_with_rank_action_and_line(text: str, told: str) -> None:
    Path("mine.txt").write_text(text)
    with pytest.raises(ConfigError, match=told):
        load_tool("draw_schedule").main(["--schedule", "mine.txt"])


def test_the_command_ends_with_2_for_bad_input_and_needs_no_torch(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/draw_schedule.py")]
    done = subprocess.run(
        [*command, "--pp", "0"], check=False, capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "megalite: --pp 0 must be above 0\n"
    code = "import sys, runpy; runpy.run_path(sys.argv[1])['main']([]); "
    code += "sys.exit('torch' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code, command[1]], check=False)
    assert loaded.returncode == 0
