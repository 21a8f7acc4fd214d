"""Which slices of what a rank owns are updated with one rate and one decay."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megalite.optim.buckets import Slot, Span
from megalite.treatment import Treatment


@dataclass(frozen=True)
class Segment:
    """The slice `[start, stop)` of a span, counted from its beginning, and its treatment."""

    start: int
    stop: int
    treatment: Treatment

    @property
    def slice(self) -> slice:
        """For indexing a tensor of the span's length."""
        return slice(self.start, self.stop)


def segments(
    slots: Sequence[Slot], spans: Sequence[Span], treatments: Mapping[str, Treatment]
) -> tuple[tuple[Segment, ...], ...]:
    """Each span cut where the treatment changes, as seldom as possible.

    Tensors packed in one matrix lie one below the other, so they may be treated apart. Buckets, and
    what data ranks exchange, do not depend on it.

    Args:
        slots: of all parameters, in the buffers' order.
        spans: what this rank owns, likewise.
        treatments: of every whole tensor, by name.
    """
    marks = list(_marks(slots, treatments))
    starts = [start for start, _ in marks]
    found = []
    for span in spans:
        cuts: list[Segment] = []
        # Padding, which stays zero, goes with what lies before it.
        for number in range(bisect_right(starts, span.start) - 1, bisect_left(starts, span.stop)):
            treatment = marks[number][1]
            begin = max(0, starts[number] - span.start)
            if cuts and cuts[-1].treatment == treatment:
                begin = cuts.pop().start
            end = min(starts[number + 1], span.stop) if number + 1 < len(starts) else span.stop
            cuts.append(Segment(begin, end - span.start, treatment))
        found.append(tuple(cuts))
    return tuple(found)


def _marks(
    slots: Sequence[Slot], treatments: Mapping[str, Treatment]
) -> Iterator[tuple[int, Treatment]]:
    """Places in the flat buffers from which on a treatment holds."""
    for slot in slots:
        row = slot.parameter.shape[1:].numel()
        for piece in slot.shard.pieces:
            rows = piece.local_start if piece.dim == 0 else 0
            yield slot.start + rows * row, treatments[piece.name]
