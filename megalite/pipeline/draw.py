"""A step of a pipeline as text. No torch import.

rank 0   F0 F1 ······B0--- ······B1---
rank 1   ···F0 B0--- F1 B1--- ·········
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from string import ascii_lowercase
from types import MappingProxyType

from megalite.pipeline.actions import Action
from megalite.pipeline.picture import WORDS, Picture

IDLE = "·"

_COLOURS: Mapping[str, str] = MappingProxyType({"F": "104", "B": "102", "I": "106", "W": "103"})
"""Of terminals, by operation: a bright background under black text."""


@dataclass(frozen=True)
class _Row:
    """One rank's line: its characters, and below each the operation that it belongs to."""

    text: str = ""
    ops: str = ""

    def idle_until(self, column: int) -> _Row:
        """The row with idle time up to a column."""
        missing = max(0, column - len(self.text))
        return _Row(self.text + IDLE * missing, self.ops + IDLE * missing)

    def then(self, label: str, room: int) -> _Row:
        """The row with an action behind it; a gap ends its room if the label leaves one."""
        if room > len(label):
            text = label.ljust(room - 1, "-") + " "
        elif room == len(label):
            text = label
        else:
            text = label[0].ljust(room)[:room]
        return _Row(self.text + text, self.ops + label[0] * len(text))

    def part(self, start: int, stop: int, coloured: bool) -> str:
        """Some of its columns."""
        text, ops = self.text[start:stop], self.ops[start:stop]
        return _painted(text, ops) if coloured else text


def legend(picture: Picture) -> str:
    """What the letters mean, of those that occur."""
    words = [f"{op} {WORDS[op]}" for op in picture.ops]
    if picture.num_chunks > 1:
        letters = " ".join(_chunk_letter(number) for number in range(picture.num_chunks))
        words.append(f"{letters} a rank's stages in turn")
    return ", ".join([*words, f"{IDLE} idle"])


def draw(picture: Picture, *, width: int = 100, unit: float = 0.0) -> str:
    """One line per rank; what is wider is cut, with an ellipsis at the cut.

    Args:
        picture: to draw.
        width: characters of a line.
        unit: time that is as wide as a label; 0: the picture's own.
    """
    lines = [
        name + row.part(0, len(row.text), coloured=False)
        for name, row in zip(_names(picture), _rows(picture, unit or picture.unit), strict=True)
    ]
    return "\n".join(line if len(line) <= width else line[: width - 1] + "…" for line in lines)


def draw_folded(
    picture: Picture, *, width: int = 100, unit: float = 0.0, coloured: bool = False
) -> str:
    """As `draw`; what is wider goes on in further blocks, each under the time that it begins at."""
    unit = unit or picture.unit
    names, rows = _names(picture), _rows(picture, unit)
    indent, length = len(names[0]), len(rows[0].text)
    cell = _cell(picture)
    room = max(1, (width - indent) // cell) * cell
    blocks = []
    for start in range(0, length, room):
        begin = picture.show(start * unit / cell)
        heading = [f"{'':{indent}s}from {begin}"] if length > room else []
        lines = [
            name + row.part(start, start + room, coloured)
            for name, row in zip(names, rows, strict=True)
        ]
        blocks.append("\n".join([*heading, *lines]))
    return "\n\n".join(blocks)


def _names(picture: Picture) -> list[str]:
    return [f"rank {rank:<3d} " for rank in range(picture.plan.num_ranks)]


def _rows(picture: Picture, unit: float) -> list[_Row]:
    """All ranks' lines, of equal length."""
    cell = _cell(picture)

    def column(time: float) -> int:
        return round(time / unit * cell)

    rows = [_Row() for _ in range(picture.plan.num_ranks)]
    for span in picture.timeline.spans:
        row = rows[span.rank].idle_until(column(span.start))
        # What rounding took from the action before is not taken from this one.
        room = column(span.end) - len(row.text)
        rows[span.rank] = row.then(_label(picture, span.action), max(0, room))
    end = column(picture.timeline.makespan)
    return [row.idle_until(end) for row in rows]


def _cell(picture: Picture) -> int:
    """Characters of the widest label and a gap."""
    return 1 + max(len(_label(picture, span.action)) for span in picture.timeline.spans)


def _label(picture: Picture, action: Action) -> str:
    chunk = _chunk_letter(picture.chunks[action.stage]) if picture.num_chunks > 1 else ""
    return f"{action.op}{action.micro_batch}{chunk}"


def _chunk_letter(number: int) -> str:
    return ascii_lowercase[number % len(ascii_lowercase)]


def _painted(text: str, ops: str) -> str:
    """The text with a background for each operation; gaps and idle time have none."""
    shown = [(op if char != " " else IDLE, char) for char, op in zip(text, ops, strict=True)]
    pieces = []
    for op, group in groupby(shown, key=lambda each: each[0]):
        piece = "".join(char for _, char in group)
        pieces.append(f"\x1b[30;{_COLOURS[op]}m{piece}\x1b[0m" if op in _COLOURS else piece)
    return "".join(pieces)
