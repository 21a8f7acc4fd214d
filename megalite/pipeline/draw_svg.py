"""Steps of a pipeline as an SVG drawing, one below the other on one scale. No torch import.

A row is a rank, a box an action with its micro-batch's number in it; the colour tells the
operation, the shade which of its rank's stages it is. Grey boxes are what a rank did after the
plan's actions. A box says more when the pointer rests on it; its `data-` attributes are for
programs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from colorsys import hls_to_rgb
from math import floor, log10
from types import MappingProxyType
from xml.sax.saxutils import escape

from megalite.pipeline.actions import Op
from megalite.pipeline.picture import WORDS, Picture

LEFT, RIGHT, TOP = 70, 30, 16
ROW, GAP = 26, 5
LINE = 18
"""Of text [px]."""

SWATCH = 14
"""Width and height of a box of the legend [px]."""

BOX = 24
"""Width of the shortest operation [px]."""

WIDEST = 30_000
"""Of a drawing [px]; a longer one is drawn on a smaller scale."""

CHARACTER = 6.5
"""Width of a digit [px]: a number that is wider than its box is left out."""

TICK = 70
"""Least distance of the time axis's marks [px]."""

_HUES: Mapping[Op, int] = MappingProxyType(
    {
        Op.FORWARD: 215,
        Op.BACKWARD: 140,
        Op.INPUT_GRADIENT: 180,
        Op.WEIGHT_GRADIENT: 40,
    }
)


def draw_svg(pictures: Sequence[Picture]) -> str:
    """The drawing, a whole SVG document."""
    end = max(_end(picture) for picture in pictures)
    scale = min(BOX / min(picture.unit for picture in pictures), WIDEST / end)
    width = max(600.0, LEFT + end * scale + RIGHT)
    body: list[str] = []
    y = float(TOP)
    for picture in pictures:
        panel, height = _panel(picture, scale)
        body += [f'<g transform="translate(0 {y:g})">', *panel, "</g>"]
        y += height + 2 * LINE
    body += [f'<g transform="translate({LEFT} {y:g})">', *_legend(pictures), "</g>"]
    y += LINE * (2 + len(WORDS))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{y:g}" '
        f'viewBox="0 0 {width:g} {y:g}" font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *body, "</svg>\n"])


def _end(picture: Picture) -> float:
    """Where the picture ends in time."""
    return max([picture.timeline.makespan, *(part.end for _, part in picture.parts)])


def _panel(picture: Picture, scale: float) -> tuple[list[str], float]:
    """One picture's elements, and its height [px]."""
    rows = LINE + 8.0
    axis = rows + picture.plan.num_ranks * (ROW + GAP)
    lines = [_text(LEFT, LINE - 4, picture.title, "bold")]
    for rank in range(picture.plan.num_ranks):
        y = rows + rank * (ROW + GAP)
        lines.append(_text(8, y + 17, f"rank {rank}"))
        length = picture.timeline.makespan * scale
        lines.append(_rectangle(LEFT, y, length, "#f2f2f2", 'class="idle"'))
    lines += _parts(picture, rows, scale)
    lines += _boxes(picture, rows, scale)
    lines += _axis(picture, axis, scale)
    y = axis + 2 * LINE + 8
    for figure in picture.figures():
        lines.append(_text(LEFT, y, figure))
        y += LINE
    return lines, y


def _boxes(picture: Picture, top: float, scale: float) -> Iterator[str]:
    """The actions."""
    for span in picture.timeline.spans:
        action, length = span.action, (span.end - span.start) * scale
        x, y = LEFT + span.start * scale, top + span.rank * (ROW + GAP)
        told = f"rank {span.rank}, {action.words()}: {picture.show(span.start)} to "
        told += picture.show(span.end)
        if span.waits_for >= 0:
            told += f", after {picture.show(span.waited)} of waiting for rank {span.waits_for}"
        data = f'class="action" data-rank="{span.rank}" data-action="{action}"'
        fill = _fill(action.op, picture.chunks[action.stage], picture.num_chunks)
        yield _rectangle(x, y, length, fill, f'{data} stroke="white"', told)
        number = str(action.micro_batch)
        if length >= CHARACTER * len(number):
            yield _text(x + length / 2, y + 17, number, anchor="middle")


def _parts(picture: Picture, top: float, scale: float) -> Iterator[str]:
    """What ranks did after the actions; before them lies no time of the picture's."""
    for rank, part in picture.parts:
        if part.start < 0:
            continue
        told = f"rank {rank}, {part.name}: {picture.show(part.start)} to {picture.show(part.end)}"
        data = f'class="part" data-rank="{rank}" data-part="{part.name}" stroke="white"'
        y, length = top + rank * (ROW + GAP), (part.end - part.start) * scale
        yield _rectangle(LEFT + part.start * scale, y, length, "#bbbbbb", data, told)


def _axis(picture: Picture, y: float, scale: float) -> Iterator[str]:
    """The time axis, with marks at round numbers."""
    end, step = _end(picture), _round_up(TICK / scale)
    yield _line(LEFT, y, LEFT + end * scale, y)
    for number in range(floor(end / step) + 1):
        x = LEFT + number * step * scale
        yield _line(x, y, x, y + 5)
        yield _text(x, y + LINE, picture.show(number * step), anchor="middle")


def _round_up(number: float) -> float:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    power = 10.0 ** floor(log10(number))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= number)


def _legend(pictures: Sequence[Picture]) -> list[str]:
    """A line for each operation, with a box for each shade."""
    chunks = max(picture.num_chunks for picture in pictures)
    lines, y = [], 0.0
    for op in (op for op in WORDS if any(op in picture.ops for picture in pictures)):
        for chunk in range(chunks):
            place = f'x="{chunk * SWATCH}" y="{y:g}" width="{SWATCH}" height="{SWATCH}"'
            lines.append(f'<rect {place} fill="{_fill(op, chunk, chunks)}" class="legend"/>')
        lines.append(_text(chunks * SWATCH + 8, y + 12, WORDS[op]))
        y += LINE
    told = "in a box: the number of the micro-batch"
    if chunks > 1:
        told += "; shades: the stages of a rank in turn"
    return [*lines, _text(0, y + 12, told)]


def _fill(op: Op, chunk: int, chunks: int) -> str:
    """The first of a rank's stages is darkest."""
    lightness = 0.62 + 0.24 * chunk / max(1, chunks - 1)
    rgb = hls_to_rgb(_HUES[op] / 360, lightness, 0.65)
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)


def _rectangle(
    x: float, y: float, length: float, fill: str, attributes: str, told: str = ""
) -> str:
    place = f'x="{x:.3f}" y="{y:g}" width="{length:.3f}" height="{ROW}"'
    if not told:
        return f'<rect {place} fill="{fill}" {attributes}/>'
    return f'<rect {place} fill="{fill}" {attributes}><title>{escape(told)}</title></rect>'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.3f}" y1="{y1:g}" x2="{x2:.3f}" y2="{y2:g}" stroke="black"/>'


def _text(x: float, y: float, text: str, weight: str = "normal", anchor: str = "start") -> str:
    place = f'x="{x:.3f}" y="{y:g}" font-weight="{weight}" text-anchor="{anchor}"'
    return f"<text {place}>{escape(text)}</text>"
