"""Steps of a pipeline as a trace for ui.perfetto.dev or chrome://tracing. No torch import.

A process is a picture, a thread of it a rank, a slice an action or a wait, an arrow a message
between ranks. Format: "Trace Event Format" of the Chromium project, its JSON object form. Times of
plans without seconds are shown as one millisecond for each unit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from megalite.pipeline.actions import Action
from megalite.pipeline.channels import received_for
from megalite.pipeline.picture import WORDS, Picture
from megalite.pipeline.simulate import Span
from megalite.pipeline.trace import maker

MICROSECONDS = 1e6
"""Of a second."""

MICROSECONDS_PER_UNIT = 1e3

INSIDE = 0.99
"""An arrow begins so far into a slice: at its very end it could belong to the next one."""

Event = dict[str, Any]


def perfetto_trace(pictures: Sequence[Picture]) -> str:
    """The trace as JSON."""
    numbers = count(1)
    events = [
        event
        for process, picture in enumerate(pictures, start=1)
        for event in _picture(picture, process, numbers)
    ]
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}) + "\n"


def _picture(picture: Picture, process: int, numbers: Iterator[int]) -> Iterator[Event]:
    scale = MICROSECONDS if picture.in_seconds else MICROSECONDS_PER_UNIT
    yield _name("process_name", picture.title, process)
    for rank in range(picture.plan.num_ranks):
        yield _name("thread_name", f"rank {rank}", process, rank)
    for name, category, rank, start, end, told in _slices(picture):
        yield {
            "ph": "X",
            "name": name,
            "cat": category,
            "pid": process,
            "tid": rank,
            "ts": start * scale,
            "dur": (end - start) * scale,
            "args": told,
        }
    spans = {span.action: span for span in picture.timeline.spans}
    for span in spans.values():
        made_by = maker(picture.plan, span.action, spans)
        if made_by is not None:
            message = _message(picture, span.action)
            yield from _arrow(message, spans[made_by], span, scale, process, next(numbers))


def _name(kind: str, name: str, process: int, thread: int = 0) -> Event:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}


_Slice = tuple[str, str, int, float, float, dict[str, Any]]
"""(name, category, rank, start, end, what is told when it is chosen)"""


def _slices(picture: Picture) -> Iterator[_Slice]:
    """Waits, actions, and what ranks did around them."""
    for span in picture.timeline.spans:
        rank, action, start = span.rank, span.action, span.start
        if span.waited > 0:
            told: dict[str, Any] = {"message": _message(picture, action)}
            yield f"waits for rank {span.waits_for}", "wait", rank, start - span.waited, start, told
        told = {
            "stage": action.stage,
            "chunk": picture.chunks[action.stage],
            "micro_batch": action.micro_batch,
        }
        yield str(action), WORDS[action.op], rank, start, span.end, told
    for rank, part in picture.parts:
        yield part.name, "part", rank, part.start, part.end, {}


def _arrow(
    message: str, sender: Span, receiver: Span, scale: float, process: int, number: int
) -> Iterator[Event]:
    """From the action that made a message to the one that takes it."""
    common = {"cat": "message", "name": message, "id": number, "pid": process}
    made = sender.start + INSIDE * (sender.end - sender.start)
    yield {"ph": "s", **common, "tid": sender.rank, "ts": made * scale}
    yield {"ph": "f", "bp": "e", **common, "tid": receiver.rank, "ts": receiver.start * scale}


def _message(picture: Picture, action: Action) -> str:
    return str(received_for(picture.plan, action))
