"""Which pipeline rank owns which stage. No torch import."""

from __future__ import annotations


def looped(num_ranks: int, chunks: int = 1) -> tuple[int, ...]:
    """Stages dealt round: 0 .. p-1, then 0 .. p-1 again, once for each chunk of a rank."""
    return tuple(range(num_ranks)) * chunks


def v_shaped(num_ranks: int) -> tuple[int, ...]:
    """Down and back up: 0 .. p-1, p-1 .. 0. The first and the last stage share a rank."""
    down = tuple(range(num_ranks))
    return down + down[::-1]
