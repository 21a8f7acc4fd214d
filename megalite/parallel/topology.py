"""Which rank sits where: world rank <-> (pp, dp, tp), by arithmetic alone. No torch import.

World ranks are the cells of a grid of shape [pp, dp, tp], counted with tp fastest, so that the
ranks of a tensor group are neighbours (NVLink), and stages are far apart (the network):

    world_rank = (pp_rank * dp + dp_rank) * tp + tp_rank

Another axis is one more name in `AXES` and one more size.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

AXES = ("pp", "dp", "tp")
"""Axis names, slowest first."""


@dataclass(frozen=True)
class Coordinates:
    """One rank's place on each axis."""

    pp: int
    dp: int
    tp: int


@dataclass(frozen=True)
class Topology:
    """Sizes of the axes [ranks]."""

    tp: int = 1
    pp: int = 1
    dp: int = 1

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.tp * self.pp * self.dp

    def world_rank(self, *, pp: int = 0, dp: int = 0, tp: int = 0) -> int:
        """World rank at these coordinates."""
        return (pp * self.dp + dp) * self.tp + tp

    def coordinates(self, world_rank: int) -> Coordinates:
        """Place of a world rank."""
        rest, tp = divmod(world_rank, self.tp)
        pp, dp = divmod(rest, self.dp)
        return Coordinates(pp=pp, dp=dp, tp=tp)

    def groups(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """World ranks of each group of an axis, in axis order; every rank is in exactly one."""
        others = [name for name in AXES if name != axis]
        found = []
        for place in product(*(range(getattr(self, name)) for name in others)):
            fixed = dict(zip(others, place, strict=True))
            members = range(getattr(self, axis))
            found.append(tuple(self.world_rank(**fixed, **{axis: i}) for i in members))
        return tuple(found)

    def shard_groups(self, size: int) -> tuple[tuple[int, ...], ...]:
        """World ranks of each group of `size` neighbours on the data axis; size divides dp."""
        return tuple(
            group[start : start + size]
            for group in self.groups("dp")
            for start in range(0, self.dp, size)
        )

    def shard_replica_groups(self, size: int) -> tuple[tuple[int, ...], ...]:
        """World ranks that have the same place in their shard groups of `size`."""
        return tuple(group[place::size] for group in self.groups("dp") for place in range(size))

    def embedding_pairs(self) -> tuple[tuple[int, int], ...]:
        """(first, last) stage's world ranks that share a tied embedding; none if pp is 1."""
        if self.pp == 1:
            return ()
        return tuple((group[0], group[-1]) for group in self.groups("pp"))

    def kv_replica_groups(self, num_kv_heads: int) -> tuple[tuple[int, ...], ...]:
        """World ranks that hold the same key/value head.

        None if every rank has its own, or if all ranks of a tensor group share one.
        """
        replicas = self.tp // num_kv_heads
        if replicas <= 1 or replicas == self.tp:
            return ()
        return tuple(
            group[start : start + replicas]
            for group in self.groups("tp")
            for start in range(0, self.tp, replicas)
        )
