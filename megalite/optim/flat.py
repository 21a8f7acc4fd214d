"""A rank's parameters and gradients in flat buffers, and the reduction of the gradients.

All parameters of a rank's stages are views of one contiguous buffer in the run's precision, all
gradients views of another in fp32 (fp64 in fp64 runs), in the same order: the matrices of one stage
after the other in order of definition, then the norm weights. So the optimizer updates a handful of
long tensors, a bucket of gradients is a slice, and so are the norm weights, whose gradients are
summed over the tensor ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megalite.layers.linear import LINEAR
from megalite.layers.shard import Shard, named_shards
from megalite.parallel.data import DataGroup
from megalite.parallel.group import AxisGroup, Pending
from megalite.parallel.groups import ParallelGroups

BUCKET_ELEMENTS = 25_000_000
"""Gradients reduced in one collective: 100 MB in fp32, where NVLink is near its best rate."""


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in the flat buffers: `[start, start + parameter.numel())`.

    Attributes:
        parameter, shard: as the layers have them.
        start: of the parameter in the flat buffers.
        stages: that use it: one, or two if embedding and head are tied on one rank.
        deferrable: schedules may compute its gradient after the input gradients.
    """

    parameter: nn.Parameter
    shard: Shard
    start: int
    stages: tuple[int, ...]
    deferrable: bool

    @property
    def stop(self) -> int:
        """End of the parameter in the flat buffers."""
        return self.start + self.parameter.numel()

    def of(self, buffer: Tensor) -> Tensor:
        """The parameter's part of a flat buffer, in the parameter's shape."""
        return buffer[self.start : self.stop].view(self.parameter.shape)


@dataclass
class _Bucket:
    """A slice of the gradients that one collective sums over the data ranks.

    Attributes:
        slots: what lies in it, all of the same stages.
        missing: gradients yet to come from its stages' last backwards.
        open_stages: stages whose last backward has not ended.
        pending: the collective, once it has begun.
    """

    slots: list[Slot] = field(default_factory=list)
    missing: int = 0
    open_stages: set[int] = field(default_factory=set)
    pending: Pending | None = None

    @property
    def start(self) -> int:
        """Begin of the slice."""
        return self.slots[-1].start

    @property
    def stop(self) -> int:
        """End of the slice."""
        return self.slots[0].stop


class FlatParameters:
    """The flat buffers of one rank.

    Args:
        stages: the rank's modules by stage; their parameters become views of the flat buffer, their
            values are kept.
        groups: of this rank.
        bucket_elements: see `BUCKET_ELEMENTS`.

    Attributes:
        slots: of all parameters.
        parameters: flat, in the parameters' dtype.
        gradients: flat, fp32 (fp64 for fp64 parameters).
        decaying: elements at the front of the buffers that weight decay applies to.
        last_use: called when the first gradient of a step comes, if anyone uses those of the step
            before until then; None: nobody does.
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        groups: ParallelGroups,
        bucket_elements: int = BUCKET_ELEMENTS,
    ):
        self._dp: DataGroup = groups.dp
        self.slots = _slots(stages)
        self._slot_of = {id(slot.parameter): slot for slot in self.slots}
        self.decaying = sum(s.parameter.numel() for s in self.slots if s.shard.decays)
        first, total = self.slots[0].parameter, self.slots[-1].stop
        self.parameters = torch.empty(total, dtype=first.dtype, device=first.device)
        self.gradients = torch.zeros(
            total, dtype=torch.promote_types(first.dtype, torch.float32), device=first.device
        )
        self._buckets = _make_buckets(self.slots, bucket_elements)
        self._bucket_of = {id(s.parameter): b for b in self._buckets for s in b.slots}
        self._closing: int | None = None
        self.last_use: Callable[[], None] | None = None
        self._are_old = False
        self._copies = _CopySums(self, groups)
        self._hooks: list[RemovableHandle] = []
        for slot in self.slots:
            view = slot.of(self.parameters)
            view.copy_(slot.parameter.data)
            slot.parameter.data = view
            hook = slot.parameter.register_post_accumulate_grad_hook(self._take)
            self._hooks.append(hook)

    def release(self) -> None:
        """Take no more gradients: hooks, which the garbage collector does not see, keep buffers."""
        for hook in self._hooks:
            hook.remove()

    def zero_gradients(self) -> None:
        """Forget the gradients of the last step, at once or after their last use."""
        for bucket in self._buckets:
            bucket.open_stages = set(bucket.slots[0].stages)
        if self.last_use is None:
            self.gradients.zero_()
        else:
            self._are_old = True

    def begin_last_gradients(self, stage: int, *, deferred: bool) -> None:
        """From here on each gradient of the stage that arrives is final, until
        `end_last_gradients`: buckets are reduced as soon as they are full.

        Args:
            stage: whose last action that gives weight gradients begins.
            deferred: it gives those only that schedules may compute later; the others are final
                already.
        """
        self._closing = stage
        for bucket in self._own_buckets(stage):
            bucket.missing = sum(slot.deferrable or not deferred for slot in bucket.slots)
        self._launch_full_buckets(stage)

    def end_last_gradients(self, stage: int) -> None:
        """The stage's gradients are complete."""
        self._closing = None
        for bucket in self._own_buckets(stage):
            assert bucket.missing == 0, f"a gradient of stage {stage} never arrived"
        for bucket in self._buckets:
            if stage in bucket.open_stages:
                bucket.open_stages.discard(stage)
                if not bucket.open_stages:
                    self._launch(bucket)

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """A micro-batch's gradient of a parameter, to the sum over micro-batches."""
        if self._are_old and self.last_use is not None:
            self.last_use()
            self.gradients.zero_()
            self._are_old = False
        self._slot_of[id(parameter)].of(self.gradients).add_(gradient)
        if self._closing is not None:
            self._bucket_of[id(parameter)].missing -= 1
            self._launch_full_buckets(self._closing)

    def finish_reduction(self) -> None:
        """Wait for the sums over dp, then sum the gradients of copies over tp and pp."""
        for bucket in self._buckets:
            assert bucket.pending is not None, "a stage's last gradients never ended"
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

    def _own_buckets(self, stage: int) -> list[_Bucket]:
        """Buckets that no other stage has a part in."""
        return [bucket for bucket in self._buckets if bucket.slots[0].stages == (stage,)]

    def _take(self, parameter: Tensor) -> None:
        """Move a gradient that autograd has finished into the flat buffer."""
        assert isinstance(parameter, nn.Parameter), "hooks are on parameters"
        # None is what a layer returned that leaves it for later.
        if parameter.grad is not None:
            self.add(parameter, parameter.grad)
            parameter.grad = None

    def _launch_full_buckets(self, stage: int) -> None:
        """Start the sums in the buckets' order, which is the same on all data ranks."""
        for bucket in self._own_buckets(stage):
            if bucket.missing:
                return
            self._launch(bucket)

    def _launch(self, bucket: _Bucket) -> None:
        if bucket.pending is None:
            assert not self._are_old, "no gradient came before the sums began"
            part = self.gradients[bucket.start : bucket.stop]
            bucket.pending = self._dp.start_gradient_sum(part)


def _slots(stages: Mapping[int, nn.Module]) -> list[Slot]:
    """Every parameter once: matrices of one stage after the other, then norm weights likewise."""
    users: dict[int, list[int]] = {}
    found: dict[int, tuple[nn.Parameter, Shard]] = {}
    deferrable: set[int] = set()
    for number, stage in sorted(stages.items()):
        for parameter, shard in named_shards(stage):
            found.setdefault(id(parameter), (parameter, shard))
            users.setdefault(id(parameter), []).append(number)
        later = getattr(stage, "weight_gradients", None)
        linear = [m for m in stage.modules() if isinstance(m, LINEAR)]
        deferrable |= {id(m.weight) for m in linear if m.weight_gradients is later}
    slots: list[Slot] = []
    for parameter, shard in sorted(found.values(), key=lambda item: not item[1].decays):
        key, start = id(parameter), slots[-1].stop if slots else 0
        slots.append(Slot(parameter, shard, start, tuple(users[key]), key in deferrable))
    return slots


def _make_buckets(slots: Sequence[Slot], elements: int) -> list[_Bucket]:
    """Matrices from the back of the buffer, as backward produces their gradients; then the norm
    weights, whose gradients are complete only when the first layer's are. None holds parameters of
    different stages."""
    buckets: list[_Bucket] = []
    for matrices in (True, False):
        group = [slot for slot in reversed(slots) if slot.shard.decays is matrices]
        for slot, previous in zip(group, [None, *group], strict=False):
            new = previous is None or previous.stages != slot.stages
            if new or buckets[-1].stop - buckets[-1].start >= elements:
                buckets.append(_Bucket())
            buckets[-1].slots.append(slot)
    return buckets


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
