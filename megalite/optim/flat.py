"""A stage's parameters and gradients in flat buffers, and the reduction of the gradients.

All parameters of a stage are views of one contiguous buffer in the run's precision, all gradients
views of another in fp32 (fp64 in fp64 runs), in the same order: the matrices in order of
definition, then the norm weights. So the optimizer updates a handful of long tensors, a bucket of
gradients is a slice, and so are the norm weights, whose gradients are summed over the tensor ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megalite.layers.shard import Shard, named_shards
from megalite.parallel.data import DataGroup
from megalite.parallel.group import AxisGroup, Pending
from megalite.parallel.groups import ParallelGroups

BUCKET_ELEMENTS = 25_000_000
"""Gradients reduced in one collective: 100 MB in fp32, where NVLink is near its best rate."""


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in the flat buffers: `[start, start + parameter.numel())`."""

    parameter: nn.Parameter
    shard: Shard
    start: int

    @property
    def stop(self) -> int:
        """End of the parameter in the flat buffers."""
        return self.start + self.parameter.numel()

    def of(self, buffer: Tensor) -> Tensor:
        """The parameter's part of a flat buffer, in the parameter's shape."""
        return buffer[self.start : self.stop].view(self.parameter.shape)


@dataclass
class _Bucket:
    """A slice of the gradients that one collective sums over the data ranks."""

    start: int
    stop: int
    slots: int
    missing: int = 0
    pending: Pending | None = field(default=None)


class FlatParameters:
    """The flat buffers of one stage.

    Args:
        stage: the module; its parameters become views of the flat buffer, their values are kept.
        groups: of this rank.
        bucket_elements: see `BUCKET_ELEMENTS`.

    Attributes:
        slots: of all parameters.
        parameters: flat, in the parameters' dtype.
        gradients: flat, fp32 (fp64 for fp64 parameters).
        decaying: elements at the front of the buffers that weight decay applies to.
    """

    def __init__(
        self,
        stage: nn.Module,
        groups: ParallelGroups,
        bucket_elements: int = BUCKET_ELEMENTS,
    ):
        self._dp: DataGroup = groups.dp
        shards = sorted(named_shards(stage), key=lambda item: not item[1].decays)
        self.slots: list[Slot] = []
        total = 0
        for parameter, shard in shards:
            self.slots.append(Slot(parameter, shard, total))
            total += parameter.numel()
        self.decaying = sum(s.parameter.numel() for s in self.slots if s.shard.decays)
        first = self.slots[0].parameter
        self.parameters = torch.empty(total, dtype=first.dtype, device=first.device)
        self.gradients = torch.zeros(
            total, dtype=torch.promote_types(first.dtype, torch.float32), device=first.device
        )
        self._buckets = self._make_buckets(bucket_elements)
        self._launched = len(self._buckets)
        self._copies = _CopySums(self, groups)
        for slot in self.slots:
            view = slot.of(self.parameters)
            view.copy_(slot.parameter.data)
            slot.parameter.data = view
            bucket = next(b for b in self._buckets if b.start <= slot.start < b.stop)
            slot.parameter.register_post_accumulate_grad_hook(self._accumulator(slot, bucket))

    def zero_gradients(self) -> None:
        """Forget the gradients of the last step."""
        self.gradients.zero_()

    def begin_last_backward(self) -> None:
        """From here on each gradient that arrives is final: full buckets are reduced at once."""
        self._launched = 0
        for bucket in self._buckets:
            bucket.missing = bucket.slots

    def finish_reduction(self) -> None:
        """Wait for the sums over dp, then sum the gradients of copies over tp and pp."""
        assert self._launched == len(self._buckets), "a gradient never arrived"
        for bucket in self._buckets:
            if bucket.pending is not None:
                bucket.pending.wait()
                bucket.pending = None
        self._copies.sum()

    def counted_slices(self) -> list[Tensor]:
        """Contiguous slices of the gradients that hold every element of the whole model once, if
        put together over all tensor and pipeline ranks."""
        spans: list[tuple[int, int]] = []
        for slot in self.slots:
            if slot.shard.tied_copy == 1:
                continue
            row = slot.parameter[0].numel() if slot.parameter.dim() > 1 else 1
            for piece in slot.shard.pieces:
                if piece.replica or not piece.length:
                    continue
                start, stop = slot.start, slot.stop
                if piece.dim == 0:
                    start += piece.local_start * row
                    stop = start + piece.length * row
                if spans and spans[-1][1] == start:
                    start = spans.pop()[0]
                spans.append((start, stop))
        return [self.gradients[start:stop] for start, stop in spans]

    def _make_buckets(self, elements: int) -> list[_Bucket]:
        """Matrices from the back of the buffer, as backward produces their gradients; then the norm
        weights, whose gradients are complete only when the first layer's are."""
        matrices = [slot for slot in self.slots if slot.shard.decays]
        norms = [slot for slot in self.slots if not slot.shard.decays]
        buckets: list[_Bucket] = []
        for group in (matrices, norms):
            open_bucket = None
            for slot in reversed(group):
                if open_bucket is None or open_bucket.stop - open_bucket.start >= elements:
                    open_bucket = _Bucket(slot.start, slot.stop, slots=0)
                    buckets.append(open_bucket)
                open_bucket.start = slot.start
                open_bucket.slots += 1
        return buckets

    def _accumulator(self, slot: Slot, bucket: _Bucket) -> Callable[[Tensor], None]:
        """The hook that moves a finished gradient into the flat buffer."""
        target = slot.of(self.gradients)

        def accumulate(parameter: Tensor) -> None:
            assert parameter.grad is not None, "called after the gradient is made"
            target.add_(parameter.grad)
            parameter.grad = None
            if self._launched < len(self._buckets):
                bucket.missing -= 1
                self._launch_full_buckets()

        return accumulate

    def _launch_full_buckets(self) -> None:
        """Start the sums in the buckets' order, which is the same on all data ranks."""
        while self._launched < len(self._buckets):
            bucket = self._buckets[self._launched]
            if bucket.missing:
                return
            bucket.pending = self._dp.start_gradient_sum(self.gradients[bucket.start : bucket.stop])
            self._launched += 1


class _CopySums:
    """Sums the gradients of parameters that several ranks of tp or pp hold.

    These are norm weights under sequence parallelism (over tp), key/value heads that several ranks
    share (over those), and a tied embedding on the first and last stage (over that pair). The order
    of these sums against those over dp does not matter, all are linear.
    """

    def __init__(self, flat: FlatParameters, groups: ParallelGroups):
        self._by_group: dict[AxisGroup, list[Tensor]] = {}
        for slot in flat.slots:
            if slot.shard.tied_copy is not None:
                embedding_group = groups.pp.embedding_group
                self._by_group.setdefault(embedding_group, []).append(slot.of(flat.gradients))
            for piece in slot.shard.pieces:
                if piece.partial:
                    group = groups.tp.replica_group(piece.replicas)
                    view = piece.of(slot.of(flat.gradients))
                    self._by_group.setdefault(group, []).append(view)

    def sum(self) -> None:
        """One collective per group."""
        for group, views in self._by_group.items():
            if len(views) == 1:
                group.all_reduce(views[0])
                continue
            packed = torch.cat([view.flatten() for view in views])
            group.all_reduce(packed)
            parts = packed.split([view.numel() for view in views])
            for view, part in zip(views, parts, strict=True):
                view.copy_(part.view_as(view))
