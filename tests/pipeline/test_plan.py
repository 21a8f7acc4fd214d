"""`python -m megalite.plan`: figures of one schedule or of all, and what is told of wrong flags."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megalite.errors import ConfigError
from megalite.pipeline.schedules import SCHEDULES, make_plan
from megalite.pipeline.text import plan_text
from megalite.pipeline.times import TIMES, read_times
from megalite.plan import figures, main, planned


def rows(text: str) -> dict[str, list[str]]:
    """Cells of the table by the schedule's name."""
    body = text.split("\n\n")[0].splitlines()[1:]
    return {name: cells for name, *cells in (line.split() for line in body)}


def test_all_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--pp", "4", "--micro-batches", "8", "--compare"]) == 0
    found = rows(capsys.readouterr().out)
    assert list(found) == list(SCHEDULES)
    # Chunks, makespan, bubble, bubble in spans, peak activations, messages: (p - 1) / (n + p - 1).
    assert found["1f1b"] == ["1", "33", "27.3%", "27.3%", "4", "16"]
    assert found["interleaved"] == ["2", "28.5", "15.8%", "15.8%", "5.5", "32"]
    assert found["zb-h1"] == ["1", "27", "11.1%", "11.1%", "4", "16"]
    assert found["zb-h2"] == ["1", "27", "11.1%", "0.0%", "7", "16"]
    assert found["zb-v"] == ["2", "25.5", "5.9%", "0.0%", "4", "32"]


def test_costs_and_chunks(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--pp 2 --micro-batches 4 --schedule interleaved --chunks 3 --costs forward=3,input=4"
    assert main([*flags.split(), "--costs", "forward=3,input=4,weight=2"]) == 0
    assert rows(capsys.readouterr().out)["interleaved"][:2] == ["3", "39"]


def test_chunks_count_only_where_a_schedule_takes_any_number() -> None:
    assert planned("zb-v", 2, 4, TIMES, chunks=3).num_stages == 4
    assert planned("gpipe", 2, 4, TIMES, chunks=3).num_stages == 6


def test_schedules_that_keep_their_own_number_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    def told(chunks: str) -> tuple[dict[str, str], list[str]]:
        assert main(["--pp", "2", "--micro-batches", "3", "--compare", *chunks.split()]) == 0
        text = capsys.readouterr().out
        number = {name: cells[0] for name, cells in rows(text).items()}
        return number, [line for line in text.splitlines() if "no effect" in line]

    number, lines = told("--chunks 3")
    own = [name for name in SCHEDULES if number[name] != "3"]
    assert set(SCHEDULES) - set(own) == {"gpipe", "1f1b", "interleaved"}
    assert lines == [f"--chunks 3 has no effect on {', '.join(own)}, which have their own number."]
    number, (line,) = told("--chunks 1")
    assert (number["interleaved"], number["zb-h1"]) == ("2", "1")
    assert "on interleaved, zb-v, " in line
    assert told("")[1] == []


def test_a_message_costs_what_is_given() -> None:
    times = read_times("message=0.25")
    assert times == {"forward": 1.0, "input": 1.0, "weight": 1.0, "message": 0.25}
    one = figures(planned("gpipe", 2, 1, times), times)
    assert one.makespan == 2 * 3 + 2 * 0.25
    assert one.messages == 1


def test_a_file_of_actions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(plan_text(make_plan("zb-v", 2, 6)))
    assert main(["--schedule", str(path)]) == 0
    assert main(["--schedule", "zb-v", "--pp", "2", "--micro-batches", "6"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert [name for name, *_ in lines] == [str(path), "zb-v"]
    assert lines[0][1:] == lines[1][1:]


@pytest.mark.parametrize(
    ("flags", "complaints"),
    [
        ("--schedule zb-w", ["--schedule zb-w: there is no such schedule or file; did you mean"]),
        ("--pp 0 --micro-batches -1", ["--pp 0 must be above 0", "--micro-batches -1 must be"]),
        ("--schedule zb-v --chunks 3", ["--chunks 3: --schedule zb-v has always 2 stages on"]),
        ("--chunks -1", ["--chunks -1 must be above 0, or 0 for the schedule's own number"]),
        ("--schedule interleaved --chunks 1", ["--schedule interleaved has at least 2 stages on"]),
        ("--schedule auto", ["--schedule auto is chosen for a run, by its model's costs; name on"]),
        ("--schedule zb-w --pp 0", ["no such schedule or file", "--pp 0 must be above 0"]),
        ("--schedule /", ["--schedule / is a folder; give a file of actions, or one of gpipe"]),
        ("--compare --schedule 1f1b", ["--schedule 1f1b has no effect with --compare"]),
        ("--costs forwards=1", ["'forwards' is unknown; did you mean forward"]),
        ("--costs forward", ["--costs forward: expected NAME=TIME"]),
        ("--costs input=x,weight=0", ["input=x: expected a number", "weight=0 must be above 0"]),
        ("--costs message=-1", ["--costs message=-1 must be at least 0 and finite"]),
        ("--costs forward=inf,input=nan", ["forward=inf must be above 0", "input=nan must be ab"]),
        ("--pp 1000 --micro-batches 1000", ["1,000,000 forwards are too many to simulate"]),
        ("--pp 0 --cots x", ["unknown flag --cots; did you mean --costs", "--pp 0 must be"]),
    ],
)
def test_what_is_wrong_is_told_at_once(flags: str, complaints: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        main(flags.split())
    for complaint in complaints:
        assert complaint in caught.value.message()


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("0F0 0B0\n1F0\n")
    with pytest.raises(ConfigError, match=r"mine.txt: rank 1 \(line 2\): 1B0 is missing"):
        main(["--schedule", str(path)])
    path.write_text("0F0 0B0\n1F0 1X0\n")
    with pytest.raises(ConfigError, match=r"mine.txt: line 2: '1X0' is not an action"):
        main(["--schedule", str(path)])
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"mine.txt: cannot be read: 'utf-8' codec"):
        main(["--schedule", str(path)])


def test_bad_input_ends_with_code_2_and_no_traceback() -> None:
    command = [sys.executable, "-m", "megalite.plan", "--pp", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--pp 0 must be above 0" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_picture_of_the_documentation(tmp_path: Path) -> None:
    """The script that makes it, and that the committed table is what it prints."""
    root = Path(__file__).parents[2]
    sys.path.insert(0, str(root / "examples"))
    try:
        import plot_schedules
    finally:
        sys.path.pop(0)
    ranks = (4, 8)
    sizes = [(name, p) for name in SCHEDULES for p in ranks]
    found = {(name, p): figures(planned(name, p, 4 * p, TIMES), TIMES) for name, p in sizes}
    text = (root / "docs/schedules.md").read_text(encoding="utf-8")
    for name in SCHEDULES:
        cells = [found[name, p] for p in ranks]
        shown = " | ".join(f"{cell.bubble:.1%}, {cell.peak:.4g}" for cell in cells)
        assert f"| `{name}` | {shown} |" in text
    whole = {(name, p): found[name, min(p, 8)] for name in SCHEDULES for p in plot_schedules.RANKS}
    drawn = plot_schedules.picture(whole, "a heading")
    tree = ElementTree.fromstring(drawn)
    circles = [e for e in tree if e.tag.endswith("circle")]
    assert len(circles) == len(SCHEDULES) * (len(plot_schedules.RANKS) + 1)
