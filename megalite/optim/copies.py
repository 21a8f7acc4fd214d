"""Sums of gradients of parameters that several ranks of the tensor and pipeline axes hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megalite.optim.buckets import Slot, Span, cut
from megalite.parallel.group import AxisGroup
from megalite.parallel.groups import ParallelGroups


class CopySums:
    """Sums the gradients of copies, after the sum over data ranks.

    These are norm weights under sequence parallelism (over tp), key/value heads that several ranks
    share (over those), and a tied embedding on the first and last stage (over that pair). All of
    them lay their parameters out alike, so each data rank sums what it owns of them. The order of
    these sums against those over dp does not matter, all are linear.

    Args:
        slots, spans: of this rank.
        parts: the gradients that this rank owns, by span.
        groups: of this rank.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        spans: Sequence[Span],
        parts: Sequence[Tensor],
        groups: ParallelGroups,
    ):
        self._by_group: dict[AxisGroup, list[Tensor]] = {}
        for slot in slots:
            for group, start, stop in _copies(slot, groups):
                views = cut(spans, parts, start, stop)
                self._by_group.setdefault(group, []).extend(views)

    def sum(self) -> None:
        """One collective per group."""
        for group, views in self._by_group.items():
            if len(views) == 1:
                group.all_reduce(views[0])
                continue
            packed = torch.cat(views) if views else None
            if packed is None:
                continue
            group.all_reduce(packed)
            for view, part in zip(views, packed.split([len(v) for v in views]), strict=True):
                view.copy_(part)


def _copies(slot: Slot, groups: ParallelGroups) -> Iterator[tuple[AxisGroup, int, int]]:
    """Slices of the flat buffers that are copies, each with who holds them."""
    if slot.shard.tied_copy is not None:
        yield groups.pp.embedding_group, slot.start, slot.stop
    row = slot.parameter.shape[1:].numel()
    for piece in slot.shard.pieces:
        if piece.partial and piece.length:
            assert piece.dim == 0, "copies of rows lie in one piece"
            start = slot.start + piece.local_start * row
            group = groups.tp.replica_group(piece.replicas)
            yield group, start, start + piece.length * row
