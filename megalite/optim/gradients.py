"""The gradients of a rank: summed over its micro-batches, then over the data ranks.

`WholeGradients` keeps the sums over micro-batches of all parameters, and reduces each bucket once a
step, during the last backward. `ShardedGradients` keeps what this rank owns, and reduces each
bucket once a micro-batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from megalite.optim.buckets import Bucket, Slot, Span, flat_length
from megalite.parallel.data import DataGroup
from megalite.parallel.group import Pending


class Gradients(Protocol):
    """What `FlatParameters` asks of either.

    Attributes:
        parts: what this rank owns, a tensor for each of its spans; the step's sums after `finish`.
    """

    parts: list[Tensor]

    def zero(self, last_use: Callable[[], None] | None) -> None:
        """Forget those of the last step; after `last_use`, if somebody still reads them."""
        ...

    def place(self, bucket: int, slot: Slot, /) -> tuple[Tensor, bool]:
        """Where a micro-batch's gradient of a parameter goes, in the parameter's shape, and whether
        it is added to what is there or takes its place."""
        ...

    def arrived(self, bucket: int) -> None:
        """It is there."""
        ...

    def begin_last(self, stage: int, *, deferred: bool) -> None:
        """The last action that gives the stage's weights gradients begins."""
        ...

    def end_last(self, stage: int) -> None:
        """It has ended."""
        ...

    def finish(self) -> None:
        """Wait until `parts` are there."""
        ...


@dataclass
class _Closing:
    """How far a bucket is in the last backwards of a step.

    Attributes:
        missing: gradients yet to come from its stages' last backwards.
        open_stages: stages whose last backward has not ended.
        pending: the sum over data ranks, once it has begun.
    """

    missing: int = 0
    open_stages: set[int] = field(default_factory=set)
    pending: Pending | None = None


class WholeGradients:
    """One buffer for the gradients of all parameters (ZeRO levels 0 and 1).

    Args:
        buckets, spans: of this rank.
        dp: sums over the data ranks.
        dtype, device: of the buffer.
        sum_dtype: in which gradients travel between data ranks.

    Attributes:
        buffer: flat.
        parts: of `buffer`.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        spans: Sequence[Span],
        dp: DataGroup,
        dtype: torch.dtype,
        device: torch.device,
        sum_dtype: torch.dtype,
    ):
        self._buckets, self._dp, self._sum_dtype = buckets, dp, sum_dtype
        self.buffer = torch.zeros(flat_length(buckets), dtype=dtype, device=device)
        self.parts = [self.buffer[span.slice] for span in spans]
        self._closing = [_Closing() for _ in buckets]
        # As gradients come: from the back, norm weights last, which the first layer completes.
        backwards = range(len(buckets) - 1, -1, -1)
        self._order = sorted(backwards, key=lambda number: not buckets[number].decays)
        self._stage: int | None = None
        self._last_use: Callable[[], None] | None = None

    def zero(self, last_use: Callable[[], None] | None) -> None:
        """At once, or when the first gradient comes."""
        for bucket, closing in zip(self._buckets, self._closing, strict=True):
            closing.open_stages = set(bucket.stages)
        self._last_use = last_use
        if last_use is None:
            self.buffer.zero_()

    def place(self, _bucket: int, slot: Slot, /) -> tuple[Tensor, bool]:
        """The sum over micro-batches."""
        if self._last_use is not None:
            self._last_use()
            self._last_use = None
            self.buffer.zero_()
        return slot.of(self.buffer), True

    def arrived(self, bucket: int) -> None:
        """Of the last ones, start the sum over data ranks."""
        if self._stage is not None:
            self._closing[bucket].missing -= 1
            self._launch_full(self._stage)

    def begin_last(self, stage: int, *, deferred: bool) -> None:
        """From here on each gradient of the stage that arrives is final, until `end_last`: buckets
        are reduced as soon as they are full.

        Args:
            stage: whose last action that gives weight gradients begins.
            deferred: it gives those only that schedules may compute later; the others are final
                already.
        """
        self._stage = stage
        for number in self._only_of(stage):
            bucket = self._buckets[number]
            comes = bucket.deferrable or not deferred
            self._closing[number].missing = bucket.arrivals if comes else 0
        self._launch_full(stage)

    def end_last(self, stage: int) -> None:
        """The stage's gradients are complete."""
        self._stage = None
        for number in self._only_of(stage):
            assert self._closing[number].missing == 0, f"a gradient of stage {stage} never arrived"
        for number in self._order:
            closing = self._closing[number]
            if stage in closing.open_stages:
                closing.open_stages.discard(stage)
                if not closing.open_stages:
                    self._launch(number)

    def finish(self) -> None:
        """Wait for the sums over the data ranks."""
        if self._last_use is not None:  # no gradient came: all parameters here are frozen
            self._last_use()
            self._last_use = None
        shards = self._dp.shards
        for bucket, closing in zip(self._buckets, self._closing, strict=True):
            assert closing.pending is not None, "a stage's last gradients never ended"
            summed = closing.pending.wait()
            closing.pending = None
            if summed.dtype != self.buffer.dtype:
                own = bucket.own(shards.rank, shards.size)
                self.buffer[own.start : own.stop].copy_(summed)

    def _only_of(self, stage: int) -> list[int]:
        """Buckets that no other stage has a part in, in the order of their sums."""
        return [number for number in self._order if self._buckets[number].stages == (stage,)]

    def _launch_full(self, stage: int) -> None:
        """Start the sums in the buckets' order, which is the same on all data ranks."""
        for number in self._only_of(stage):
            if self._closing[number].missing:
                return
            self._launch(number)

    def _launch(self, number: int) -> None:
        closing, bucket = self._closing[number], self._buckets[number]
        if closing.pending is None:
            assert self._last_use is None, "no gradient came before the sums began"
            part = self.buffer[bucket.start : bucket.stop]
            # A copy where it travels in another precision, else the part itself.
            closing.pending = self._dp.start_gradient_sum(part.to(self._sum_dtype))


@dataclass
class _Transient:
    """A bucket whose gradients of one micro-batch are arriving, or being summed.

    Attributes:
        number: of the bucket.
        storage: at least as long as the bucket.
        buffer: of the bucket's length; padding is zero.
        missing: gradients yet to come.
        begun: slots, by their starts, of which one has come.
        pending: the sum over the shard group, once it has begun.
    """

    number: int
    storage: Tensor
    buffer: Tensor
    missing: int
    begun: set[int] = field(default_factory=set)
    pending: Pending | None = None


class ShardedGradients:
    """Sums of what this rank owns (ZeRO level 2).

    A bucket's gradients of a micro-batch are written into a transient buffer, summed over the shard
    group as soon as they are all there, and this rank's part is added to what it keeps. Of buffers
    for matrices there are two, one to fill while the other is summed, and two small ones for norm
    weights, whose gradients come between the matrices'.

    Args:
        buckets: of this rank.
        dp: sums over the data ranks.
        dtype, device: of the buffers.
        sum_dtype: in which gradients travel between data ranks.

    Attributes:
        parts: one for each bucket.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        dp: DataGroup,
        dtype: torch.dtype,
        device: torch.device,
        sum_dtype: torch.dtype,
    ):
        self._buckets, self._dp, self._sum_dtype = buckets, dp, sum_dtype
        empty = partial(torch.empty, dtype=dtype, device=device)
        self.parts = [empty(b.length // dp.shards.size).zero_() for b in buckets]
        self._free: dict[bool, list[Tensor]] = {}
        for decays in {bucket.decays for bucket in buckets}:
            longest = max(bucket.length for bucket in buckets if bucket.decays == decays)
            self._free[decays] = [empty(longest) for _ in range(2)]
        self._filling: dict[int, _Transient] = {}
        self._scattering: deque[_Transient] = deque()

    def zero(self, last_use: Callable[[], None] | None) -> None:
        """At once."""
        assert last_use is None, "nobody reads gradients later under this level"
        for part in self.parts:
            part.zero_()

    def place(self, bucket: int, slot: Slot, /) -> tuple[Tensor, bool]:
        """In the bucket's transient buffer."""
        filling = self._filling.get(bucket) or self._begin(bucket)
        start, shape = slot.start - self._buckets[bucket].start, slot.parameter.shape
        is_second = start in filling.begun
        filling.begun.add(start)
        return filling.buffer[start : start + shape.numel()].view(shape), is_second

    def arrived(self, bucket: int) -> None:
        """When the bucket is full, start its sum over the shard group."""
        filling = self._filling[bucket]
        filling.missing -= 1
        if not filling.missing:
            del self._filling[bucket]
            filling.pending = self._dp.start_shard_sum(filling.buffer.to(self._sum_dtype))
            self._scattering.append(filling)

    def begin_last(self, stage: int, *, deferred: bool) -> None:
        """Each bucket is summed when it is full, in the last backward as in others."""

    def end_last(self, stage: int) -> None:
        """See `begin_last`."""

    def finish(self) -> None:
        """Wait for all sums; those over replicas of the shard group are made here, on the parts."""
        assert not self._filling, "a gradient never arrived"
        while self._scattering:
            self._collect()
        replicas = self._dp.replicas
        if replicas.size > 1:
            sums = [replicas.start_all_reduce(part.to(self._sum_dtype)) for part in self.parts]
            for part, pending in zip(self.parts, sums, strict=True):
                part.copy_(pending.wait())

    def _begin(self, number: int) -> _Transient:
        """A buffer for a bucket, after the sum of the one that had it."""
        bucket = self._buckets[number]
        free = self._free[bucket.decays]
        while not free:
            assert self._scattering, "more buckets fill at a time than there are buffers"
            self._collect()
        storage = free.pop()
        buffer = storage[: bucket.length]
        buffer[bucket.slots[-1].stop - bucket.start :].zero_()
        self._filling[number] = _Transient(number, storage, buffer, bucket.arrivals)
        return self._filling[number]

    def _collect(self) -> None:
        """Add the oldest sum under way to what this rank keeps."""
        done = self._scattering.popleft()
        assert done.pending is not None, "begun when the bucket was full"
        self.parts[done.number].add_(done.pending.wait())
        self._free[self._buckets[done.number].decays].append(done.storage)
