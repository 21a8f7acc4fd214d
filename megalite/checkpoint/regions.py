"""Where slices of whole tensors lie in a buffer, and what two of them have in common. No torch
import.

A tensor is a matrix here: a vector is one of a single column, and a scalar of a single element.
What a rank holds of a matrix is a *region*: a run of elements of a box, row by row. A box is what
the tensor axis cuts; a run is what data ranks cut of it, anywhere. A region falls into at most
three rectangles, and rectangles of two layouts overlap in rectangles: so any layout's state is put
together from any other's by copies of rectangles, and nobody reads more than it needs.

Source: after the shard metadata of PyTorch's distributed checkpoints, which know boxes alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple


class Rectangle(NamedTuple):
    """A rectangle of a matrix, and where a buffer has it.

    Attributes:
        row, column: of the matrix, where it begins.
        rows, columns: how many.
        at: element of the buffer that it begins with.
        stride: elements from one row to the next in the buffer.
    """

    row: int
    column: int
    rows: int
    columns: int
    at: int
    stride: int

    def moved(self, elements: int) -> Rectangle:
        """As a larger buffer has it, in which the buffer begins with this element."""
        return self._replace(at=self.at + elements)


class Copy(NamedTuple):
    """A rectangle that two buffers have: its size, and element and stride in each."""

    rows: int
    columns: int
    source_at: int
    source_stride: int
    target_at: int
    target_stride: int


@dataclass(frozen=True)
class Region:
    """Elements `[start, stop)` of a box of a matrix, counted row by row in the box.

    Attributes:
        row, column, rows, columns: the box.
        start, stop: see above.
    """

    row: int
    column: int
    rows: int
    columns: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Elements."""
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole box."""
        return self.length == self.rows * self.columns

    def cut(self, start: int, stop: int) -> Region:
        """What it has in common with elements `[start, stop)` of the box; may be empty."""
        start = max(self.start, start)
        return Region(
            self.row, self.column, self.rows, self.columns, start, max(start, min(self.stop, stop))
        )

    def rectangles(self) -> Iterator[Rectangle]:
        """At most three, which cover it; their buffer is the region alone."""
        at = self.start
        while at < self.stop:
            row, column = divmod(at, self.columns)
            left = self.stop - at
            if column or left < self.columns:
                rows, columns = 1, min(left, self.columns - column)
            else:
                rows, columns = left // self.columns, self.columns
            yield Rectangle(
                self.row + row, self.column + column, rows, columns, at - self.start, self.columns
            )
            at += rows * columns


def whole(shape: Sequence[int]) -> Region:
    """All of a tensor of this shape."""
    rows, columns = as_matrix(shape)
    return Region(0, 0, rows, columns, 0, rows * columns)


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor of this shape."""
    if len(shape) < 2:
        return prod(shape), 1
    return shape[0], prod(shape[1:])


def overlap(source: Rectangle, target: Rectangle) -> Copy | None:
    """What both have; None: nothing."""
    row, column = max(source.row, target.row), max(source.column, target.column)
    rows = min(source.row + source.rows, target.row + target.rows) - row
    columns = min(source.column + source.columns, target.column + target.columns) - column
    if rows <= 0 or columns <= 0:
        return None
    return Copy(rows, columns, *_place(source, row, column), *_place(target, row, column))


def covers_once(shape: Sequence[int], regions: Sequence[Region]) -> str:
    """What is wrong with regions that ought to hold every element of a tensor once; empty: nothing.

    How long it takes follows from the regions, whatever the shape says.
    """
    rows, columns = as_matrix(shape)
    for region in regions:
        if (
            min(region.row, region.column, region.start) < 0
            or region.row + region.rows > rows
            or region.column + region.columns > columns
            or not region.start < region.stop <= region.rows * region.columns
        ):
            return f"a slice lies outside of its shape {list(shape)}"
    held = sum(region.length for region in regions)
    if held != rows * columns:
        return f"its slices hold {held} of {rows * columns} elements"
    return "slices overlap" if _overlap_at_all(regions) else ""


def _place(rectangle: Rectangle, row: int, column: int) -> tuple[int, int]:
    """Element and stride in its buffer of a place of the matrix."""
    down, right = row - rectangle.row, column - rectangle.column
    return rectangle.at + down * rectangle.stride + right, rectangle.stride


def _overlap_at_all(regions: Sequence[Region]) -> bool:
    """By rows, from above: what begins before another one's end is compared with it."""
    rectangles = sorted(r for region in regions for r in region.rectangles())
    open_: list[Rectangle] = []
    for rectangle in rectangles:
        open_ = [r for r in open_ if r.row + r.rows > rectangle.row]
        if any(overlap(r, rectangle) for r in open_):
            return True
        open_.append(rectangle)
    return False
