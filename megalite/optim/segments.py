"""Which slices of what a rank owns are updated in one call: with one rate and one decay, and, where
anything is rounded at random, with one sequence of random numbers.

Copies of a weight on several ranks have to stay copies, so they are rounded alike: an element's
numbers depend on the seed, the slice of the whole tensor that it lies in, its place in this slice,
and the count of updates. They are the same on all data ranks, and whatever pp, dp and ZeRO are;
another tp cuts other slices.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megalite.optim.buckets import Slot, Span
from megalite.parallel.rng import make_key
from megalite.treatment import Treatment


@dataclass(frozen=True)
class Segment:
    """The slice `[start, stop)` of a span, counted from its beginning.

    Attributes:
        start, stop: see above.
        treatment: rate and decay.
        draws: as `adamw_` takes them: a key, and the place of the first element; None: nothing is
            rounded at random.
    """

    start: int
    stop: int
    treatment: Treatment
    draws: tuple[int, int] | None

    @property
    def slice(self) -> slice:
        """For indexing a tensor of the span's length."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class _Mark:
    """A place in the flat buffers from which on a treatment holds, and a key."""

    start: int
    treatment: Treatment
    key: int | None


def segments(
    slots: Sequence[Slot],
    spans: Sequence[Span],
    treatments: Mapping[str, Treatment],
    seed: int | None = None,
) -> tuple[tuple[Segment, ...], ...]:
    """Each span cut where the treatment or the key changes, as seldom as possible.

    Tensors packed in one matrix lie one below the other, so they may be treated apart. Buckets, and
    what data ranks exchange, do not depend on it.

    Args:
        slots: of all parameters, in the buffers' order.
        spans: what this rank owns, likewise.
        treatments: of every whole tensor, by name.
        seed: of the run; None: nothing is rounded at random.
    """
    marks = list(_marks(slots, treatments, seed))
    starts = [mark.start for mark in marks]
    found = []
    for span in spans:
        cuts: list[Segment] = []
        # Padding, which stays zero, goes with what lies before it.
        for number in range(bisect_right(starts, span.start) - 1, bisect_left(starts, span.stop)):
            mark = marks[number]
            begin = max(0, mark.start - span.start)
            draws = None
            if mark.key is not None:
                draws = mark.key, span.start + begin - mark.start
            elif cuts and cuts[-1].treatment == mark.treatment:
                begin = cuts.pop().start
            end = min(starts[number + 1], span.stop) if number + 1 < len(starts) else span.stop
            cuts.append(Segment(begin, end - span.start, mark.treatment, draws))
        found.append(tuple(cuts))
    return tuple(found)


def _marks(
    slots: Sequence[Slot], treatments: Mapping[str, Treatment], seed: int | None
) -> Iterator[_Mark]:
    """Of every slice of a whole tensor."""
    for slot in slots:
        row = slot.parameter.shape[1:].numel()
        for piece in slot.shard.pieces:
            rows = piece.local_start if piece.dim == 0 else 0
            key = None
            if seed is not None:
                key = make_key(seed, "rounding", piece.name, piece.dim, piece.start)
            yield _Mark(slot.start + rows * row, treatments[piece.name], key)
