"""Whose random numbers round what a rank updates in bf16.

Copies of a weight on several ranks have to stay copies, so they are rounded alike: an element's
numbers depend on the seed, the slice of the whole tensor that it lies in, its place in this slice,
and the count of updates. They are the same on all data ranks, and whatever pp, dp and ZeRO are;
another tp cuts other slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megalite.optim.buckets import Slot, Span
from megalite.parallel.rng import make_key


@dataclass(frozen=True)
class Stretch:
    """What is updated in one call.

    Attributes:
        part: of a span.
        draws: as `adamw_` takes them: a key, and the place of the first element; None: nothing is
            rounded.
    """

    part: slice
    draws: tuple[int, int] | None


def stretches(
    slots: Sequence[Slot], spans: Sequence[Span], seed: int | None
) -> list[list[Stretch]]:
    """The stretches of each span.

    Padding, which is zero for ever, is left out where anything is rounded.

    Args:
        slots, spans: of a rank.
        seed: of the run; None: nothing is rounded, and each span is one stretch.
    """
    if seed is None:
        return [[Stretch(slice(None), None)] for _ in spans]
    pieces = list(_pieces(slots, seed))
    return [
        [
            Stretch(
                slice(max(start, span.start) - span.start, min(stop, span.stop) - span.start),
                (key, max(start, span.start) - start),
            )
            for start, stop, key in pieces
            if start < span.stop and span.start < stop
        ]
        for span in spans
    ]


def _pieces(slots: Sequence[Slot], seed: int) -> Iterator[tuple[int, int, int]]:
    """The slices of whole tensors: start and stop in the flat buffers, and their keys."""
    for slot in slots:
        row = slot.parameter.shape[1:].numel()
        for piece in slot.shard.pieces:
            start, stop = slot.start, slot.stop
            if piece.dim == 0:
                start += piece.local_start * row
                stop = start + piece.length * row
            if start < stop:
                yield start, stop, make_key(seed, "rounding", piece.name, piece.dim, piece.start)
