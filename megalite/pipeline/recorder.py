"""When each action of this rank ran: marks on its device's clock, read after the steps.

Nothing here waits inside a step. On the CPU a mark is a reading of the host's clock. On a GPU it is
an event in the queue of the stream that computes, so that it says when the GPU came to it and not
when the host did; the two clocks are set against each other once, before the step begins.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch

from megalite.parallel.group import AxisGroup
from megalite.pipeline.actions import Action, Plan
from megalite.pipeline.simulate import Span
from megalite.pipeline.trace import Part, RankStep
from megalite.pipeline.trace_file import write_plan, write_rank

HANDSHAKES = 15

SAME_CLOCK_S = 0.05
"""Clocks that differ by less are one: those of two machines differ by how much longer one is up."""


class Clock(Protocol):
    """Marks of one device."""

    def start(self) -> None:
        """Forget what was marked, and set this clock against the host's."""
        ...

    def mark(self) -> Any:
        """This moment."""
        ...

    def seconds(self, mark: Any) -> float:
        """The mark on the host's clock, `time.perf_counter`; waits until the device is there."""
        ...


class HostClock:
    """Marks of the CPU, on which the host computes itself."""

    def start(self) -> None:
        """Nothing to set."""

    def mark(self) -> float:
        """This moment [s]."""
        return time.perf_counter()

    def seconds(self, mark: float) -> float:
        """The mark itself."""
        return mark


class GpuClock:
    """Marks in the queue of the current stream."""

    def start(self) -> None:
        """Wait for all that is queued: the next mark is reached when it is set."""
        torch.cuda.synchronize()
        self._zero_s, self._zero = time.perf_counter(), self.mark()

    def mark(self) -> torch.cuda.Event:
        """When the GPU comes to this point."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, mark: torch.cuda.Event) -> float:
        """When the GPU came to the mark."""
        mark.synchronize()
        return self._zero_s + self._zero.elapsed_time(mark) / 1e3


@dataclass
class _Action:
    """Marks of one action; `wait` and `peer` of the message that brought its input."""

    action: Action
    start: Any
    wait: Any = None
    peer: int = -1
    end: Any = None


@dataclass
class _Step:
    """Marks of one step."""

    number: int
    clock: Clock
    parts: list[tuple[str, Any]] = field(default_factory=list)
    actions: list[_Action] = field(default_factory=list)
    waiting: tuple[Any, int] = (None, -1)
    end: Any = None


class Recorder:
    """One rank's record of steps. Outside of `begin_step` and `end_step` its hooks do nothing.

    Args:
        device: of the rank.
        rank: of the pipeline.

    Attributes:
        device: as given.
        plan: that the last recorded step followed.
    """

    def __init__(self, device: torch.device, rank: int):
        self.device, self._rank = device, rank
        self._steps: dict[int, _Step] = {}
        self._now: _Step | None = None
        self.plan: Plan | None = None

    def begin_step(self, number: int) -> None:
        """Record from here on; on a GPU, waits until all is done that came before."""
        clock = GpuClock() if self.device.type == "cuda" else HostClock()
        clock.start()
        self._now = self._steps[number] = _Step(number, clock)
        self.enters("samples")

    def end_step(self) -> None:
        """Record no more."""
        if self._now is not None:
            self._now.end = self._now.clock.mark()
            self._now = None

    def enters(self, part: str) -> None:
        """Hook: a part of the step begins; see `trace.PARTS`."""
        if self._now is not None:
            self._now.parts.append((part, self._now.clock.mark()))

    def runs(self, plan: Plan) -> None:
        """Hook: the first action of a plan is next."""
        if self._now is not None:
            self.plan = plan
            self.enters("pipeline")

    def waits(self, peer: int) -> None:
        """Hook: the next action's input may still be under way from pipeline rank `peer`."""
        if self._now is not None:
            self._now.waiting = (self._now.clock.mark(), peer)

    def begins(self, action: Action) -> None:
        """Hook: the action's input has come."""
        if self._now is not None:
            recorded = _Action(action, self._now.clock.mark(), *self._now.waiting)
            self._now.actions.append(recorded)
            self._now.waiting = (None, -1)

    def ends(self) -> None:
        """Hook: the action is done, or queued on a GPU."""
        if self._now is not None:
            self._now.actions[-1].end = self._now.clock.mark()

    def steps(self) -> list[RankStep]:
        """All recorded steps on the host's clock [s]; waits until the last one is done."""
        return [
            RankStep(step.number, tuple(_parts(step)), tuple(_spans(step, self._rank)))
            for step in self._steps.values()
            if step.end is not None
        ]

    def spans(self, number: int) -> tuple[Span, ...]:
        """This rank's actions in a recorded step on the host's clock [s], with their waits."""
        return tuple(_spans(self._steps[number], self._rank))

    def durations(self, number: int) -> dict[Action, float]:
        """What each of this rank's actions took in a recorded step [s]."""
        return {span.action: span.end - span.start for span in self.spans(number)}

    def clear(self) -> None:
        """Forget all steps."""
        self._steps.clear()


def _parts(step: _Step) -> Iterator[Part]:
    ends = [mark for _, mark in step.parts[1:]] + [step.end]
    for (name, start), end in zip(step.parts, ends, strict=True):
        yield Part(name, step.clock.seconds(start), step.clock.seconds(end))


def _spans(step: _Step, rank: int) -> Iterator[Span]:
    for each in step.actions:
        start, end = step.clock.seconds(each.start), step.clock.seconds(each.end)
        waited = start - step.clock.seconds(each.wait) if each.peer >= 0 else 0.0
        yield Span(rank, each.action, start, end, each.peer, waited)


def clock_offset(group: AxisGroup, device: torch.device) -> float:
    """What to add to this host's `time.perf_counter` for the time on the group's first rank [s].

    All ranks leave a collective at nearly the same time; the median of several counts. 0 on ranks
    whose clock is the first one's, as on one machine, where no estimate is as good as the clock.
    """
    readings = torch.zeros(HANDSHAKES, dtype=torch.float64)
    for number in range(HANDSHAKES):
        group.all_reduce(torch.zeros(1, device=device)).item()
        readings[number] = time.perf_counter()
    first = (readings if group.is_first else torch.zeros_like(readings)).to(device, copy=True)
    difference = group.all_reduce(first).cpu() - readings
    offset = median(difference.tolist())
    return offset if abs(offset) > SAME_CLOCK_S else 0.0


def on_clock(step: RankStep, offset: float) -> RankStep:
    """The step with an offset added to all its times [s]."""
    parts = (replace(p, start=p.start + offset, end=p.end + offset) for p in step.parts)
    spans = (replace(s, start=s.start + offset, end=s.end + offset) for s in step.spans)
    return replace(step, parts=tuple(parts), spans=tuple(spans))


def write_record(recorder: Recorder, folder: Path, pp: AxisGroup) -> None:
    """Write this rank's steps to its run's folder, and on the first rank the plan.

    Args:
        recorder: which has recorded steps.
        folder: of the run.
        pp: the pipeline, all of whose ranks call this.
    """
    plan, rank = recorder.plan, pp.rank
    assert plan is not None, "steps were recorded"
    offset = clock_offset(pp, recorder.device)
    steps = [on_clock(step, offset) for step in recorder.steps()]
    write_rank(folder, plan, rank, recorder.device.type, steps)
    if pp.is_first:
        write_plan(folder, plan)
