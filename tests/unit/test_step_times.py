"""Where ranks' time goes: shares of what was seen, and their table."""

from __future__ import annotations

import pytest

from megalite.parallel.activity import Activity
from megalite.parallel.hang import State
from megalite.parallel.step_times import ROWS, SAMPLES, WAITING, Samples, table


def test_shares_of_what_was_seen() -> None:
    """Of the last samples, and of all."""
    samples = Samples()
    for _ in range(SAMPLES - 1):
        samples.add("stage 0, micro-batch 3, backward", waits=False)
        assert samples.lately() == samples.ever() == {}
    for _ in range(SAMPLES // 2):
        samples.add("stage 0, micro-batch 1, forward", waits=True)
    shares = samples.lately()
    assert shares == {"backward": 0.5, WAITING: 0.5}
    assert State.from_json(State(0, 1, "", "", 0.0, shares=shares).to_json()).shares == shares
    assert samples.ever() == pytest.approx({"backward": 49 / 74, WAITING: 25 / 74})


def test_time_of_the_steps_that_are_looked_at() -> None:
    """The first one, which compiles and allocates, is not."""
    activity = Activity()
    assert activity.samples.mean_step_s == 0
    for seconds in (5.0, 1.0, 2.0):
        activity.begin("step", "step")
        activity.since -= seconds
    activity.begin("the end")
    assert activity.samples.mean_step_s == pytest.approx(1.5, abs=0.1)
    assert activity.step_s == pytest.approx(2.0, abs=0.1)


def test_a_row_of_each_rank() -> None:
    """What nearly nobody does has no column; each row adds up to the step."""
    shares = {
        "0 (pp 0)": {"forward": 0.25, "backward": 0.5, "reading samples": 0.005, WAITING: 0.245},
        "1 (pp 1)": {"backward": 0.75, "forward": 0.25},
    }
    assert table(shares, 0.8).splitlines() == [
        "rank      backward  forward  other  waiting for others",
        "0 (pp 0)     400.0    200.0    4.0               196.0",
        "1 (pp 1)     600.0    200.0    0.0                 0.0",
    ]


def test_too_little_is_known() -> None:
    assert table({}, 1.0) == table({"0": {"forward": 1.0}, "1": {}}, 1.0) == ""


def test_of_many_ranks_those_at_the_ends() -> None:
    shares = {str(r): {"forward": 1 - r / 100, WAITING: r / 100} for r in range(ROWS + 4)}
    lines = table(shares, 1.0).splitlines()
    assert [line.split()[0] for line in lines[1:9]] == [str(r) for r in range(8)]
    assert lines[9] == "... 4 more, between these in how long they wait"
    assert [line.split()[0] for line in lines[10:]] == [str(r) for r in range(12, 20)]
