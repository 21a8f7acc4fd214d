"""The record of what happened to a run, and what its time went into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megalite.events import Event, Events, Goodput, environment, goodput, read_events


def made(*events: tuple[float, str, dict[str, Any]]) -> list[Event]:
    return [{"time": t, "event": event, "attempt": 0, **facts} for t, event, facts in events]


def test_lines_are_added_and_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    Events(path).write("start", step=0)
    Events(path, attempt=2).write("stop", why='a "signal"\n', code=75)
    first, second = read_events(path)
    assert (first["event"], first["attempt"], first["step"]) == ("start", 0, 0)
    assert (second["event"], second["attempt"], second["why"]) == ("stop", 2, 'a "signal"\n')
    assert second["time"] >= first["time"] > 1.7e9


def test_half_a_line_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "start"}\n{"event": "sto')
    Events(path).write("start", step=3)
    assert [event["event"] for event in read_events(path)] == ["start", "start"]


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Events(None).write("start", step=0)
    assert not list(tmp_path.iterdir())


def test_the_environment_names_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("SOME_SECRET", "x")
    found = environment()
    assert {"megalite", "torch", "numpy"} <= set(found["packages"])
    assert found["variables"]["NCCL_DEBUG"] == "INFO" and "SOME_SECRET" not in found["variables"]


def test_goodput_of_a_calm_run() -> None:
    events = made(
        (100.0, "start", dict(step=0)),
        (107.0, "steps", dict(first=1, step=6, seconds=6.0)),
        (108.0, "save", dict(step=6, seconds=1.0)),
        (112.0, "steps", dict(first=7, step=10, seconds=4.0)),
        (120.0, "end", dict(step=10)),
    )
    found = goodput(events)
    assert found == Goodput(wall_s=20.0, step_s=10.0, save_s=1.0, starts=1, lost_steps=0)
    assert found.share == 0.5
    assert str(found) == (
        "effective training time 50.0%: 10.0 s in steps of 20.0 s; 0 steps lost, 0 restarts, 1.0 s "
        "standing still for saves"
    )


def test_steps_done_twice_count_once_and_are_lost() -> None:
    """Saved after 6, killed in step 12, goes on with step 7."""
    events = made(
        (0.0, "start", dict(step=0)),
        (6.0, "steps", dict(first=1, step=6, seconds=6.0)),
        (7.0, "save", dict(step=6, seconds=1.0)),
        (11.0, "steps", dict(first=7, step=10, seconds=4.0)),
        (12.0, "restart", dict(step=11, why="rank 1 was killed by SIGKILL")),
        (30.0, "start", dict(step=6, attempt=1)),
        (36.0, "steps", dict(first=7, step=12, seconds=6.0, attempt=1)),
        (40.0, "end", dict(step=12, attempt=1)),
    )
    assert goodput(events) == Goodput(40.0, 12.0, 1.0, starts=2, lost_steps=5)


def test_a_restart_in_the_middle_of_a_span_takes_its_share_away() -> None:
    events = made(
        (0.0, "start", dict(step=0)),
        (10.0, "steps", dict(first=1, step=10, seconds=10.0)),
        (11.0, "start", dict(step=4, attempt=1)),
        (12.0, "start", dict(step=2, attempt=2)),
    )
    assert goodput(events) == Goodput(12.0, pytest.approx(2.0), 0.0, starts=3, lost_steps=8)


def test_the_pause_after_a_stop_is_nobodys_time() -> None:
    events = made(
        (0.0, "start", dict(step=0)),
        (10.0, "steps", dict(first=1, step=5, seconds=8.0)),
        (10.0, "stop", dict(step=5, code=75)),
        (9000.0, "start", dict(step=5)),
        (9010.0, "steps", dict(first=6, step=9, seconds=8.0)),
    )
    assert goodput(events) == Goodput(20.0, 16.0, 0.0, starts=2, lost_steps=0)


def test_goodput_of_nothing() -> None:
    assert goodput([]).share == 0.0
