"""The trace read back: slices are the actions and waits, arrows the messages between ranks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megalite.pipeline.actions import Action
from megalite.pipeline.channels import counterpart, is_message
from megalite.pipeline.costs import Costs
from megalite.pipeline.lower import lower
from megalite.pipeline.perfetto import perfetto_trace
from megalite.pipeline.picture import Picture, planned
from megalite.pipeline.text import parse_plan
from megalite.pipeline.trace import Part

TEXT = (
    "0F0 0F1 3F0 3I0 0I0 3F1 3I1 3W0 0I1 0W0 3W1 0W1\n"
    "1F0 2F0 1F1 2F1 2I0 1I0 2I1 1I1 2W0 1W0 2W1 1W1"
)


@pytest.fixture
def picture() -> Picture:
    plan = parse_plan(TEXT, "mine")
    return planned(plan, Costs.uniform(plan.num_stages, forward=1.5, message=0.25))


def events(*pictures: Picture) -> list[dict[str, Any]]:
    return json.loads(perfetto_trace(pictures))["traceEvents"]


def slices(found: list[dict[str, Any]], *categories: str) -> dict[str, dict[str, Any]]:
    return {e["name"]: e for e in found if e["ph"] == "X" and e["cat"] in categories}


def test_each_action_is_a_slice_of_its_rank(picture: Picture) -> None:
    found = events(picture)
    actions = slices(found, "forward", "input gradient", "weight gradient")
    assert len(actions) == len(picture.timeline.spans) == 24
    for span in picture.timeline.spans:
        event = actions[str(span.action)]
        assert event["tid"] == span.rank
        assert event["ts"] == pytest.approx(1e3 * span.start)
        assert event["dur"] == pytest.approx(1e3 * (span.end - span.start))
        assert event["args"]["stage"] == span.action.stage
    names = {e["tid"]: e["args"]["name"] for e in found if e["name"] == "thread_name"}
    assert names == {0: "rank 0", 1: "rank 1"}


def test_each_message_is_an_arrow_from_its_maker_to_its_taker(picture: Picture) -> None:
    found = events(picture)
    actions = slices(found, "forward", "input gradient", "weight gradient")
    begins = {e["id"]: e for e in found if e["ph"] == "s"}
    ends = {e["id"]: e for e in found if e["ph"] == "f"}
    program = lower(picture.plan)
    received = [m for order in program.ranks for m in order if is_message(m) and "RECV" in m.op]
    assert sorted(e["name"] for e in ends.values()) == sorted(map(str, received))
    assert begins.keys() == ends.keys()
    for number, begin in begins.items():
        message = Action.parse(begin["name"])
        op = "F" if message.op.endswith("F") else "I"
        maker = actions[f"{counterpart(message).stage}{op}{message.micro_batch}"]
        taker = actions[f"{message.stage}{op}{message.micro_batch}"]
        assert begin["tid"] == maker["tid"] != taker["tid"] == ends[number]["tid"]
        assert maker["ts"] < begin["ts"] < maker["ts"] + maker["dur"]
        assert ends[number]["ts"] == taker["ts"]
        assert ends[number]["bp"] == "e"


def test_waits_fill_the_time_until_what_was_waited_for(picture: Picture) -> None:
    waits = [e for e in events(picture) if e.get("cat") == "wait"]
    expected = [s for s in picture.timeline.spans if s.waited > 0]
    assert len(waits) == len(expected) > 0
    for wait, span in zip(waits, expected, strict=True):
        assert wait["name"] == f"waits for rank {span.waits_for}"
        assert wait["ts"] + wait["dur"] == pytest.approx(1e3 * span.start)
        assert wait["dur"] == pytest.approx(1e3 * span.waited)
    first = next(w for w in waits if w["tid"] == 1)
    assert first["args"] == {"message": "1RECV_F0"}


def test_seconds_are_seconds_and_pictures_are_processes(picture: Picture) -> None:
    parts = ((1, Part("optimizer", 30.0, 31.0)),)
    run = Picture("run", picture.plan, picture.timeline, picture.costs, True, parts)
    found = events(picture, run)
    names = {e["pid"]: e["args"]["name"] for e in found if e["name"] == "process_name"}
    assert names == {1: "mine", 2: "run"}
    (optimizer,) = [e for e in found if e.get("cat") == "part"]
    place = (optimizer["pid"], optimizer["tid"], optimizer["ts"], optimizer["dur"])
    assert place == (2, 1, 30e6, 1e6)
    numbers = [e["id"] for e in found if e["ph"] == "s"]
    assert len(numbers) == len(set(numbers)), "arrows of two pictures are not one"
