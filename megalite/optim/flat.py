"""A rank's parameters and gradients in flat buffers, sharded over the data ranks as ZeRO does.

All parameters of a rank's stages that ask for a gradient are views of a row of buckets
(`megalite.optim.buckets`) in the run's precision. Their gradients, fp32 (fp64 in fp64 runs), lie in
the same order, whole or as shards. Each data rank of a shard group owns an equal part of each
bucket: it gets the sum of those gradients, updates those parameters, and passes them on to the
others, at once or when they are used. A shard group of one rank owns everything, and nothing is
passed on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megalite.layers.linear import LINEAR
from megalite.layers.shard import Shard, named_shards
from megalite.optim.buckets import (
    counted_spans,
    cut,
    flat_length,
    make_buckets,
    own_spans,
)
from megalite.optim.copies import CopySums
from megalite.optim.filling import BUCKET_ELEMENTS
from megalite.optim.gathered import GatheredWeights
from megalite.optim.gradients import Gradients, ShardedGradients, WholeGradients
from megalite.parallel.group import Pending
from megalite.parallel.groups import ParallelGroups
from megalite.pipeline.actions import Use
from megalite_kernels.products import accumulate_product_

Draw = Callable[[nn.Parameter, Shard], None]
"""Gives a parameter its initial values."""


class FlatParameters:
    """The flat buffers of one rank.

    Args:
        stages: the rank's modules by stage; their parameters become views of the flat buffer, their
            values are kept.
        groups: of this rank; `groups.dp.shards` is the shard group.
        shards_gradients: keep only what this rank owns of the gradients (ZeRO level 2).
        shards_weights: of matrices too, which are whole only while they are used (ZeRO level 3).
        reduce_dtype: in which gradients travel between data ranks; None: their own.
        bucket_elements: see `BUCKET_ELEMENTS`; with `shards_weights` a bucket is a layer.
        draw: gives parameters, which have no memory yet, their values; None: they have them.

    Attributes:
        slots: of all parameters that ask for a gradient.
        frozen: the other parameters, in no buffer, whole on every rank, with their shards.
        gradient_dtype: fp32 or fp64.
        spans: what this rank owns of the flat buffers.
        length: elements of a flat buffer.
        dtype, device: of the parameters.
        own_parameters: what this rank owns of them, a tensor for each span.
        own_gradients: likewise of the gradients; the step's sums after `finish_reduction`.
        last_use: called when the first gradient of a step comes, if anyone uses those of the step
            before until then; None: nobody does.
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        groups: ParallelGroups,
        *,
        shards_gradients: bool = False,
        shards_weights: bool = False,
        reduce_dtype: torch.dtype | None = None,
        bucket_elements: int = BUCKET_ELEMENTS,
        draw: Draw | None = None,
    ):
        self._shards = groups.dp.shards
        rank, size = self._shards.rank, self._shards.size
        shards_weights = shards_weights and size > 1
        self._buckets = make_buckets(stages, size, bucket_elements, by_layer=shards_weights)
        self.slots = tuple(slot for bucket in self._buckets for slot in bucket.slots)
        self.spans = own_spans(self._buckets, rank, size)
        self._place = {
            id(slot.parameter): (number, slot)
            for number, bucket in enumerate(self._buckets)
            for slot in bucket.slots
        }
        trained = {id(slot.parameter) for slot in self.slots}
        held = {id(p): (p, shard) for s in stages.values() for p, shard in named_shards(s)}
        self.frozen = tuple(held[key] for key in held if key not in trained)
        first = next(iter(held.values()))[0]
        self.length = flat_length(self._buckets)
        self.dtype, self.device = first.dtype, first.device
        dtype, device = torch.promote_types(first.dtype, torch.float32), first.device
        self.gradient_dtype = dtype
        sum_dtype = reduce_dtype if reduce_dtype and groups.dp.size > 1 else dtype
        how = dtype, device, sum_dtype
        self._gradients: Gradients
        if shards_gradients and size > 1:
            self._gradients = ShardedGradients(self._buckets, groups.dp, *how)
        else:
            self._gradients = WholeGradients(self._buckets, self.spans, groups.dp, *how)
        self.own_gradients = self._gradients.parts
        self.last_use: Callable[[], None] | None = None
        self._copies = CopySums(self.slots, self.spans, self.own_gradients, groups)
        self._arriving: dict[int, Pending] = {}
        self._hooks: list[RemovableHandle] = []
        self._wholes, self.own_parameters = self._place_weights(draw, apart=shards_weights)
        if draw is not None:
            for parameter, shard in self.frozen:
                parameter.untyped_storage().resize_(parameter.nbytes)
                draw(parameter, shard)
        # The garbage collector does not see that parameters hold their hooks: one that held this
        # would keep all buffers and groups for ever.
        this = weakref.ref(self)

        def take(parameter: Tensor) -> None:
            flat = this()
            assert flat is not None, "gradients come while somebody has the buffers"
            flat._take(parameter)

        for slot in self.slots:
            hook = slot.parameter.register_post_accumulate_grad_hook(take)
            self._hooks.append(hook)
        self._linear = [m for s in stages.values() for m in s.modules() if isinstance(m, LINEAR)]
        for module in self._linear:
            module.weight_gradients.sums = self
        self._gathered = self._make_gathered(stages) if shards_weights else None
        if size > 1:
            self._await_before_use(stages)

    def release(self) -> None:
        """Take no more gradients: hooks, which the garbage collector does not see, keep buffers."""
        for hook in self._hooks:
            hook.remove()
        for module in self._linear:
            module.weight_gradients.sums = None

    def zero_gradients(self) -> None:
        """Forget the gradients of the last step, at once or after their last use."""
        self._gradients.zero(self.last_use)

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """A micro-batch's gradient of a parameter, to the sum over micro-batches."""
        bucket, slot = self._place[id(parameter)]
        target, is_sum = self._gradients.place(bucket, slot)
        if is_sum:
            target.add_(gradient)
        else:
            target.copy_(gradient)
        self._gradients.arrived(bucket)

    def add_product(self, parameter: nn.Parameter, a: Tensor, b: Tensor) -> None:
        """As `add`, of a @ b: the product is accumulated in the gradients' precision."""
        bucket, slot = self._place[id(parameter)]
        target, is_sum = self._gradients.place(bucket, slot)
        accumulate_product_(target, a, b, keep=is_sum)
        self._gradients.arrived(bucket)

    def begin_last_gradients(self, stage: int, *, deferred: bool) -> None:
        """From here on each gradient of the stage that arrives is final, until
        `end_last_gradients`; `deferred`: only those come that schedules may compute later."""
        self._gradients.begin_last(stage, deferred=deferred)

    def end_last_gradients(self, stage: int) -> None:
        """The stage's gradients are complete."""
        self._gradients.end_last(stage)

    def finish_reduction(self) -> None:
        """Wait for the sums over dp, then sum the gradients of copies over tp and pp."""
        self._gradients.finish()
        self._copies.sum()

    def begin_action(self, use: Use | None, following: Use | None) -> None:
        """What an action does with weights, and the next one that uses any; see
        `GatheredWeights.begin`."""
        if self._gathered is not None:
            self._gathered.begin(use, following)

    def await_weight(self, parameter: nn.Parameter) -> None:
        """The parameter may be read afterwards, until another layer's is awaited."""
        place = self._place.get(id(parameter))
        if place is None:  # frozen
            return
        number = place[0]
        if self._gathered is not None and number in self._gathered:
            self._gathered.use(number)
            return
        pending = self._arriving.pop(number, None)
        if pending is not None:
            pending.wait()

    def counted_gradients(self) -> list[Tensor]:
        """Slices of what this rank owns of the gradients: every element of the whole model once,
        if put together over the shard group and all tensor and pipeline ranks."""
        return [
            view
            for start, stop in counted_spans(self.slots)
            for view in cut(self.spans, self.own_gradients, start, stop)
        ]

    def pass_on(self, span: int) -> None:
        """Start to exchange a span's parameters, which this rank has updated, for the others'.

        Every rank of the shard group calls it for the same spans in the same order. Modules wait
        for their parameters before they use them.
        """
        if self._gathered is not None and span in self._gathered:
            self._gathered.forget(span)
        elif self._shards.size > 1:
            whole, own = self._wholes[span], self.own_parameters[span]
            self._arriving[span] = self._shards.start_all_gather_into(whole, own)

    def wait_for_parameters(self) -> None:
        """All parameters that are whole between steps may be read afterwards."""
        while self._arriving:
            self._arriving.popitem()[1].wait()

    def whole_parameters(self) -> Iterator[tuple[nn.Parameter, Shard]]:
        """Each parameter with its shard; it may be read until the next one is asked for.

        Every rank of the shard group takes all of them.
        """
        for slot in self.slots:
            self.await_weight(slot.parameter)
            yield slot.parameter, slot.shard
        yield from self.frozen

    def whole(self, parts: Sequence[Tensor]) -> Tensor:
        """A flat buffer put together from what the ranks of the shard group own of it.

        Args:
            parts: this rank's, by span.
        """
        dtype = parts[0].dtype if parts else self.gradient_dtype
        whole = torch.empty(self.length, dtype=dtype, device=self.device)
        parts = [part.to(self.device) for part in parts]  # offloaded states are the host's
        if self._shards.size == 1 and parts:
            return torch.cat(parts, out=whole)
        for bucket, part in zip(self._buckets, parts, strict=True):
            into = whole[bucket.start : bucket.stop]
            self._shards.start_all_gather_into(into, part).wait()
        return whole

    def _take(self, parameter: Tensor) -> None:
        """Move a gradient that autograd has finished into the flat buffer."""
        assert isinstance(parameter, nn.Parameter), "hooks are on parameters"
        # None is what a layer returned that leaves it for later.
        if parameter.grad is not None:
            self.add(parameter, parameter.grad)
            parameter.grad = None

    def _place_weights(
        self, draw: Draw | None, *, apart: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Move all parameters into the buckets.

        Args:
            draw: see the class.
            apart: what is gathered has memory of its own, whole and owned; one bucket at a time is
                whole here.

        Returns:
            The whole buckets, and what this rank owns of them by span.
        """
        new = partial(torch.zeros, dtype=self.dtype, device=self.device)
        buffer = new(0 if apart else self.length)
        wholes: list[Tensor] = []
        owned: list[Tensor] = []
        for bucket in self._buckets:
            whole = new(bucket.length) if apart else buffer[bucket.start : bucket.stop]
            for slot in bucket.slots:
                start = slot.start - bucket.start
                view = whole[start : start + slot.parameter.numel()].view(slot.parameter.shape)
                if draw is None:
                    view.copy_(slot.parameter.data)
                slot.parameter.data = view
                if draw is not None:
                    draw(slot.parameter, slot.shard)
            wholes.append(whole)
            own = whole.chunk(self._shards.size)[self._shards.rank]
            if apart and bucket.decays:
                own = own.clone()
                whole.untyped_storage().resize_(0)
            owned.append(own)
        return wholes, owned if apart else [buffer[span.slice] for span in self.spans]

    def _make_gathered(self, stages: Mapping[int, nn.Module]) -> GatheredWeights:
        """Of the matrices' buckets; norm weights, a thousandth of all, stay whole."""
        matrices = [n for n, bucket in enumerate(self._buckets) if bucket.decays]

        def used(modules: Iterable[nn.Module]) -> list[int]:
            """Their buckets, in their order."""
            found = (self._bucket_of(module) for module in modules)
            return [n for n, _ in groupby(n for n in found if n in matrices)]

        layers = {stage: list(module.modules()) for stage, module in stages.items()}
        return GatheredWeights(
            self._shards,
            {number: self._wholes[number] for number in matrices},
            {number: self.own_parameters[number] for number in matrices},
            {stage: used(modules) for stage, modules in layers.items()},
            # A lookup in the embedding needs no weights in its backward.
            {
                stage: used(m for m in reversed(modules) if isinstance(m, LINEAR))
                for stage, modules in layers.items()
            },
        )

    def _bucket_of(self, module: nn.Module) -> int | None:
        """Number of the bucket with the module's weight, if it has one."""
        place = self._place.get(id(getattr(module, "weight", None)))
        return None if place is None else place[0]

    def _await_before_use(self, stages: Mapping[int, nn.Module]) -> None:
        """Make each module with a parameter wait for it, layer after layer, in its forward."""

        def wait(module: nn.Module, _: object) -> None:
            weight = module.weight
            assert isinstance(weight, nn.Parameter), "only modules with one have this hook"
            self.await_weight(weight)

        for stage in stages.values():
            for module in stage.modules():
                if self._bucket_of(module) is not None:
                    self._hooks.append(module.register_forward_pre_hook(wait))
