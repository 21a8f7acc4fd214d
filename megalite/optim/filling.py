"""Which parameters share a bucket, from their sizes alone. No torch import."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

BUCKET_ELEMENTS = 25_000_000
"""Gradients reduced in one collective: 100 MB in fp32, where NVLink is near its best rate."""


def fill_buckets(
    sizes: Sequence[int], kinds: Sequence[Hashable], elements: int = BUCKET_ELEMENTS
) -> list[range]:
    """Buckets of neighbours, filled from the back, as backward produces gradients.

    Each has at least so many elements unless the parameter before is of another kind.

    Args:
        sizes, kinds: of each parameter.
        elements: that a bucket is full with.

    Returns:
        Indices of each bucket's parameters, front to back.
    """
    buckets: list[range] = []
    stop = len(sizes)
    held = 0
    for index in reversed(range(len(sizes))):
        held += sizes[index]
        if index == 0 or kinds[index - 1] != kinds[index] or held >= elements:
            buckets.append(range(index, stop))
            stop, held = index, 0
    return buckets[::-1]
