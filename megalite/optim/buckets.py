"""Where each parameter lies in a rank's flat buffers, and which part of them each data rank owns.

The buffers are a row of buckets: matrices of one stage after the other in order of definition, then
the norm weights. A bucket is what one collective sums; cut into equal parts, one for each rank of
the shard group, it is what each of those ranks updates. So it ends in padding where its parameters
don't divide. No process group is needed to say all this.

Source: Rajbhandari et al., "ZeRO", arXiv:1910.02054, with the flat buckets of Megatron-LM's
distributed optimizer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from megalite.layers.linear import LINEAR
from megalite.layers.shard import Shard, named_shards
from megalite.optim.filling import BUCKET_ELEMENTS, fill_buckets

ALIGNED_ELEMENTS = 64
"""A shard begins at a multiple of so many, which kernels and NCCL read in their widest words."""


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in the flat buffers: `[start, start + parameter.numel())`.

    Attributes:
        parameter, shard: as the layers have them.
        start: of the parameter in the flat buffers.
        stages: that use it: one, or two if embedding and head are tied on one rank.
        deferrable: schedules may compute its gradient after the input gradients.
        arrivals: gradients of it that come in a stage's backward: one, or two if embedding and head
            are tied on one stage, the head's product and the embedding's.
    """

    parameter: nn.Parameter
    shard: Shard
    start: int
    stages: tuple[int, ...]
    deferrable: bool
    arrivals: int

    @property
    def stop(self) -> int:
        """End of the parameter in the flat buffers."""
        return self.start + self.parameter.numel()

    def of(self, buffer: Tensor) -> Tensor:
        """The parameter's part of a flat buffer, in the parameter's shape."""
        return buffer[self.start : self.stop].view(self.parameter.shape)

    @property
    def kind(self) -> tuple[object, ...]:
        """What parameters of one bucket have in common: when their gradients come, how they are
        updated, and with which ranks they are summed."""
        shard = self.shard
        return self.stages, shard.decays, shard.is_hidden, self.deferrable, shard.tied_copy

    @property
    def layer(self) -> str:
        """The layer that a matrix belongs to, by its name; norm weights belong to none."""
        is_matrix = self.shard.decays
        return ".".join(self.shard.pieces[0].name.split(".")[:3]) if is_matrix else ""


@dataclass(frozen=True)
class Bucket:
    """The slice `[start, stop)` of the flat buffers.

    Attributes:
        slots: of one kind, in the buffers' order.
        start, stop: with the padding behind the last slot.
    """

    slots: tuple[Slot, ...]
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Elements, the padding among them."""
        return self.stop - self.start

    @property
    def arrivals(self) -> int:
        """Gradients that come for it in a stage's backward."""
        return sum(slot.arrivals for slot in self.slots)

    @property
    def stages(self) -> tuple[int, ...]:
        """That use its parameters."""
        return self.slots[0].stages

    @property
    def decays(self) -> bool:
        """Whether weight decay applies."""
        return self.slots[0].shard.decays

    @property
    def deferrable(self) -> bool:
        """Whether schedules may compute its gradients after the input gradients."""
        return self.slots[0].deferrable

    def own(self, rank: int, size: int) -> range:
        """Elements of the flat buffers that a rank of a shard group owns."""
        length = self.length // size
        return range(self.start + rank * length, self.start + (rank + 1) * length)


@dataclass(frozen=True)
class Span:
    """The slice `[start, stop)` of the flat buffers, owned by one rank; weight decay or none.

    Attributes:
        matrices: the whole bucket that this is a part of, if it holds matrices of layers; empty of
            anything else.
    """

    start: int
    stop: int
    decays: bool
    matrices: tuple[Slot, ...] = field(default=(), compare=False)

    @property
    def slice(self) -> slice:
        """For indexing a flat buffer."""
        return slice(self.start, self.stop)


def make_buckets(
    stages: Mapping[int, nn.Module],
    num_shards: int = 1,
    elements: int = BUCKET_ELEMENTS,
    *,
    by_layer: bool = False,
) -> tuple[Bucket, ...]:
    """The buckets of a rank with these stages, in the buffers' order; see `fill_buckets`.

    Args:
        stages: by number.
        num_shards: equal parts that each bucket is cut into.
        elements: that a bucket is full with.
        by_layer: a bucket for the matrices of each layer, however many elements they have.
    """
    slots = _slots(stages)
    sizes = [slot.parameter.numel() for slot in slots]
    kinds = [(slot.kind, slot.layer if by_layer else "") for slot in slots]
    if by_layer:
        elements = sum(sizes)
    unit = num_shards * ALIGNED_ELEMENTS if num_shards > 1 else 1
    buckets: list[Bucket] = []
    start = 0
    for indices in fill_buckets(sizes, kinds, elements):
        placed, at = [], start
        for index in indices:
            placed.append(replace(slots[index], start=at))
            at += sizes[index]
        stop = start + -(-(at - start) // unit) * unit
        buckets.append(Bucket(tuple(placed), start, stop))
        start = stop
    return tuple(buckets)


def flat_length(buckets: Sequence[Bucket]) -> int:
    """Elements of the flat buffers; none on a rank all of whose parameters are frozen."""
    return buckets[-1].stop if buckets else 0


def own_spans(buckets: Sequence[Bucket], rank: int, size: int) -> tuple[Span, ...]:
    """What a rank of a shard group owns, in the buffers' order.

    Neighbours are joined, but for buckets with matrices of layers, which Muon takes one at a time.
    """
    spans: list[Span] = []
    for bucket in buckets:
        own, decays = bucket.own(rank, size), bucket.decays
        start, matrices = own.start, bucket.slots if bucket.slots[0].shard.is_hidden else ()
        if (
            not matrices
            and spans
            and not spans[-1].matrices
            and spans[-1].stop == start
            and spans[-1].decays == decays
        ):
            start = spans.pop().start
        spans.append(Span(start, own.stop, decays, matrices))
    return tuple(spans)


def cut(spans: Sequence[Span], parts: Sequence[Tensor], start: int, stop: int) -> Iterator[Tensor]:
    """Views of what a rank owns of the slice `[start, stop)` of the flat buffers.

    Args:
        spans, parts: what the rank owns, and a tensor of each span's length.
        start, stop: of the slice.
    """
    at = max(0, bisect_right(spans, start, key=lambda span: span.start) - 1)
    for span, part in zip(spans[at:], parts[at:], strict=True):
        if span.start >= stop:
            return
        first, last = max(start, span.start), min(stop, span.stop)
        if first < last:
            yield part[first - span.start : last - span.start]


def counted_spans(slots: Sequence[Slot]) -> list[tuple[int, int]]:
    """Slices `(start, stop)` of the flat buffers that hold every element of the whole model once,
    if put together over all tensor and pipeline ranks."""
    spans: list[tuple[int, int]] = []
    for slot in slots:
        if slot.shard.tied_copy == 1:
            continue
        row = slot.parameter.shape[1:].numel()
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
    return spans


def _slots(stages: Mapping[int, nn.Module]) -> list[Slot]:
    """Every parameter that is trained, once: matrices of one stage after the other, then norm
    weights likewise; not placed yet."""
    users: dict[int, list[int]] = {}
    found: dict[int, tuple[nn.Parameter, Shard]] = {}
    deferrable: set[int] = set()
    tied: set[int] = set()
    for number, stage in sorted(stages.items()):
        trained = [(p, shard) for p, shard in named_shards(stage) if p.requires_grad]
        for parameter, shard in trained:
            found.setdefault(id(parameter), (parameter, shard))
            users.setdefault(id(parameter), []).append(number)
        later = getattr(stage, "weight_gradients", None)
        linear = [m for m in stage.modules() if isinstance(m, LINEAR)]
        deferrable |= {id(m.weight) for m in linear if m.weight_gradients is later}
        others = [m for m in stage.modules() if not isinstance(m, LINEAR)]
        tied |= {id(m.weight) for m in linear} & {id(getattr(m, "weight", None)) for m in others}
    order = sorted(found.values(), key=lambda item: not item[1].decays)
    return [
        Slot(
            parameter,
            shard,
            start=0,
            stages=tuple(users[id(parameter)]),
            deferrable=id(parameter) in deferrable,
            arrivals=2 if id(parameter) in tied else 1,
        )
        for parameter, shard in order
    ]
