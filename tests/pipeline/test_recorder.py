"""The recorder: marks become spans, parts and waits on one clock; outside of a step it is idle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megalite.parallel.group import AxisGroup
from megalite.parallel.pipeline import PipelineGroup
from megalite.pipeline import recorder as module
from megalite.pipeline.actions import Action
from megalite.pipeline.recorder import Recorder, clock_offset, on_clock, write_record
from megalite.pipeline.simulate import Span
from megalite.pipeline.text import parse_plan
from megalite.pipeline.trace import Part, RankStep
from megalite.pipeline.trace_file import read_trace

CPU = torch.device("cpu")
PLAN = parse_plan("0F0 0B0", "mine")


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading of the host's clock is one second after the one before, 1 first."""
    seconds = iter(range(1, 1000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(seconds)))


def record(recorder: Recorder, step: int) -> None:
    """A forward, and a backward that waits for rank 1."""
    recorder.begin_step(step)
    recorder.runs(PLAN)
    recorder.begins(Action.parse("0F0"))
    recorder.ends()
    recorder.waits(1)
    recorder.begins(Action.parse("0B0"))
    recorder.ends()
    recorder.enters("gradient sums")
    recorder.enters("optimizer")
    recorder.end_step()


FORWARD = Span(0, Action.parse("0F0"), 3.0, 4.0)
BACKWARD = Span(0, Action.parse("0B0"), 6.0, 7.0, 1, 1.0)


def test_a_step() -> None:
    recorder = Recorder(CPU, 0)
    record(recorder, 3)
    parts = (
        Part("samples", 1.0, 2.0),
        Part("pipeline", 2.0, 8.0),
        Part("gradient sums", 8.0, 9.0),
        Part("optimizer", 9.0, 10.0),
    )
    assert recorder.steps() == [RankStep(3, parts, (FORWARD, BACKWARD))]
    assert recorder.spans(3) == (FORWARD, BACKWARD)
    assert recorder.durations(3) == {FORWARD.action: 1.0, BACKWARD.action: 1.0}
    assert recorder.plan is PLAN


def test_nothing_is_recorded_outside_of_a_step() -> None:
    recorder = Recorder(CPU, 0)
    recorder.runs(PLAN)
    recorder.waits(1)
    recorder.begins(Action.parse("0F0"))
    recorder.ends()
    recorder.end_step()
    assert recorder.steps() == []
    assert recorder.plan is None
    record(recorder, 7)
    recorder.waits(5)
    recorder.begins(Action.parse("0F0"))
    record(recorder, 8)
    assert [step.step for step in recorder.steps()] == [7, 8]
    assert [span.waits_for for span in recorder.spans(8)] == [-1, 1]
    recorder.clear()
    assert recorder.steps() == []


class Ranks(AxisGroup):
    """This rank's view of a group whose first rank's clock is some seconds ahead or behind."""

    def __init__(self, rank: int, ahead: float):
        super().__init__()
        self.rank, self._ahead = rank, ahead

    def all_reduce(self, x: Tensor, *, maximum: bool = False) -> Tensor:
        assert not maximum
        if x.numel() > 1 and not self.is_first:
            # Readings of the first rank, which left one of the collectives late.
            x += torch.arange(1, x.numel() + 1) + self._ahead
            x[4] += 100
        return x


@pytest.mark.parametrize(("ahead", "offset"), [(3600.0, 3600.0), (-7.5, -7.5), (0.01, 0.0)])
def test_the_clocks_of_two_machines_become_one(ahead: float, offset: float) -> None:
    assert clock_offset(Ranks(1, ahead), CPU) == offset


def test_the_first_rank_has_the_clock_of_the_trace() -> None:
    assert clock_offset(Ranks(0, 3600.0), CPU) == 0.0


def test_a_step_on_another_clock() -> None:
    step = RankStep(3, (Part("samples", 1.0, 2.0),), (BACKWARD,))
    moved = on_clock(step, 10.0)
    assert moved.parts == (Part("samples", 11.0, 12.0),)
    assert moved.spans == (Span(0, BACKWARD.action, 16.0, 17.0, 1, 1.0),)


def test_a_record_is_written_for_the_tool(tmp_path: Path) -> None:
    recorder = Recorder(CPU, 0)
    record(recorder, 3)
    expected = recorder.steps()
    write_record(recorder, tmp_path, PipelineGroup())
    trace = read_trace(tmp_path)
    assert trace.steps == {3: tuple(expected)}
    assert trace.plan.ranks == PLAN.ranks


class Event:
    """A GPU's event: reached at a time of the GPU's own clock, in milliseconds."""

    times: Iterator[float]
    waited = False

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.ms = next(Event.times)

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, other: Event) -> float:
        assert other.waited, "an event is read once the GPU has come to it"
        return other.ms - self.ms


def test_events_of_a_gpu_are_read_on_the_hosts_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    synchronized = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: synchronized.append(True))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    Event.times = iter([5000.0 + 250.0 * number for number in range(100)])
    recorder = Recorder(torch.device("cuda"), 0)
    record(recorder, 3)
    assert synchronized == [True], "once, before the step"
    # The host's clock showed 1 s when the GPU's stood at 5000 ms; an event every 250 ms since.
    assert recorder.steps()[0].parts[0] == Part("samples", 1.25, 1.5)
    assert recorder.spans(3)[0] == Span(0, FORWARD.action, 1.75, 2.0)
    assert recorder.spans(3)[1] == Span(0, BACKWARD.action, 2.5, 2.75, 1, 0.25)
