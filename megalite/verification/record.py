"""A run step by step, with everything a rank holds on the way: for comparison, not for training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from megalite.config import Config
from megalite.data.samples import PADDING, sample_order
from megalite.layers.shard import Piece, Shard
from megalite.optim.buckets import Slot, counted_spans
from megalite.optim.flat import FlatParameters
from megalite.parallel.groups import ParallelGroups
from megalite.parallel.rng import make_key
from megalite.tokenizer.byte import ByteTokenizer
from megalite.trainer import Trainer
from megalite.verification.sites import watch_stage

Samples_of = tuple[int, ...]
"""Numbers of a micro-batch's samples in the global batch."""


class VerificationSamples:
    """Random tokens, of which some end a document: how many differs from sample to sample.

    Samples of packed documents end in padding, up to half of them.

    Args:
        config: sequence length, vocabulary, seed and packing.
    """

    num_samples = 1 << 20

    def __init__(self, config: Config):
        self._length, self._vocab_size = config.model.seq_length + 1, config.model.vocab_size
        self._seed = config.train.seed
        self._is_packed = config.data.packing != "stream"

    def order(self, places: np.ndarray) -> np.ndarray:
        """Samples at these places of the run, int64, shape of `places`."""
        return sample_order(places, self.num_samples, self._seed)

    def read(self, index: int) -> np.ndarray:
        """Tokens of one sample, int64 [seq + 1]."""
        key = make_key(self._seed, "verification", index) & ((1 << 63) - 1)
        generator = np.random.Generator(np.random.Philox(key=key))
        tokens = generator.integers(0, self._vocab_size, self._length, dtype=np.int64)
        ends = generator.random(self._length) < 0.4 * generator.random()
        tokens[ends] = ByteTokenizer.eod
        if self._is_packed:
            tokens[self._length - generator.integers(0, self._length // 2 + 1) :] = PADDING
        return tokens


@dataclass(frozen=True)
class Part:
    """What one rank holds of a whole tensor.

    Attributes:
        name: of the whole tensor.
        dim, start: where the slice begins in it.
        counts: whether it is the copy that is saved and counts in the norm.
        value: on the CPU.
    """

    name: str
    dim: int
    start: int
    counts: bool
    value: Tensor

    def of(self, whole: Tensor) -> Tensor:
        """The same slice of another whole tensor."""
        return whole.narrow(self.dim, self.start, self.value.shape[self.dim])


@dataclass(frozen=True)
class RankStep:
    """What one rank saw in a step.

    Attributes:
        loss, norm: as reported.
        gradients: reduced, before clipping, of the loss itself.
        weights: after the step.
        activations: by site and samples, if they were watched.
    """

    loss: float
    norm: float
    gradients: list[Part]
    weights: list[Part]
    activations: dict[tuple[str, Samples_of], Tensor] = field(default_factory=dict)


class Recorder:
    """Takes the steps of a run on one rank.

    Args:
        config: resolved, device and precision included.
        groups, device: of this rank.
        watch: record activations too.
    """

    def __init__(
        self, config: Config, groups: ParallelGroups, device: torch.device, *, watch: bool
    ):
        samples = VerificationSamples(config)
        self.trainer = Trainer(config, (samples, samples, None), groups, device)
        self.trainer.optimizer.guess_wrong()  # so that what is compared has been amended
        self._watch = watch
        self._last = self._last_with_gradients()

    def weights(self) -> list[Part]:
        """The weights as they are: of bf16 and fp16 runs the master weights."""
        return [*self._named(self.trainer.optimizer.master), *self._frozen()]

    def step(self, step: int, *, poisoned: bool = False, factor: float = 1.0) -> RankStep:
        """Take a step.

        Args:
            step: number, 0 first.
            poisoned: the last rank of the world that has gradients gets one that is not finite.
            factor: that all gradients are multiplied by.
        """
        groups = self.trainer.groups
        activations: dict[tuple[str, Samples_of], Tensor] = {}
        is_last = groups.world_rank == self._last
        with self._watched(activations), self._poisoned(poisoned and is_last):
            loss = self.trainer.accumulate(step)
        for part in self.trainer.flat.own_gradients:
            part.mul_(factor)
        scale = self.trainer.optimizer.loss_scale.value
        gradients = self._named([part / scale for part in self.trainer.flat.own_gradients])
        statistics = self.trainer.update(step, loss)
        self.trainer.optimizer.validate()
        norm, mean_loss, *_ = statistics.tolist()
        return RankStep(mean_loss, norm, gradients, self.weights(), activations)

    def _named(self, parts: Sequence[Tensor]) -> list[Part]:
        """The named slices in what the shard group owns together."""
        return list(_parts(self.trainer.flat, self.trainer.flat.whole(parts)))

    def _frozen(self) -> Iterator[Part]:
        """The named slices in parameters that no flat buffer holds."""
        for parameter, shard in self.trainer.flat.frozen:
            yield from _pieces(parameter, shard)

    @contextmanager
    def _watched(self, activations: dict[tuple[str, Samples_of], Tensor]) -> Iterator[None]:
        """Keep what passes the sites. A layer that is computed again in backward is seen once."""
        handles = []
        for stage in self.trainer.stages.values() if self._watch else ():
            current: list[Samples_of] = []

            def begin(_stage: object, inputs: tuple, current: list = current) -> None:
                current[:] = [tuple(inputs[1].samples.tolist())]

            def seen(site: str, x: Tensor, current: list = current) -> None:
                activations.setdefault((site, current[0]), x.detach().double().cpu().clone())

            handles.append(stage.register_forward_pre_hook(begin))
            handles += watch_stage(stage, seen)
        yield
        for handle in handles:
            handle.remove()

    def _last_with_gradients(self) -> int:
        """The last rank of the world that has gradients which count in the norm."""
        groups = self.trainer.groups
        have = torch.zeros(groups.topology.world_size, device=self.trainer.device)
        have[groups.world_rank] = bool(self._counted_slots())
        for axis in (groups.tp, groups.pp, groups.dp):
            axis.all_reduce(have)
        return int(have.nonzero().max())

    def _counted_slots(self) -> list[Slot]:
        return [slot for slot in self.trainer.flat.slots if counted_spans([slot])]

    @contextmanager
    def _poisoned(self, here: bool) -> Iterator[None]:
        """Make a gradient that only this rank computes infinite or NaN."""
        if not here:
            yield
            return
        # A matrix inside a layer, if one is trained: no other rank has a copy of its gradient.
        slot = sorted(self._counted_slots(), key=lambda slot: slot.deferrable)[-1]
        flat = self.trainer.flat
        add, add_product = flat.add, flat.add_product

        def broken(parameter: nn.Parameter, gradient: Tensor) -> None:
            add(parameter, gradient * torch.inf if parameter is slot.parameter else gradient)

        def broken_product(parameter: nn.Parameter, a: Tensor, b: Tensor) -> None:
            add_product(parameter, a * torch.inf if parameter is slot.parameter else a, b)

        flat.add = broken  # type: ignore[method-assign]
        flat.add_product = broken_product  # type: ignore[method-assign]
        yield
        del flat.add, flat.add_product


def _parts(flat: FlatParameters, buffer: Tensor) -> Iterator[Part]:
    """The named slices in a flat buffer."""
    for slot in flat.slots:
        yield from _pieces(slot.of(buffer), slot.shard)


def _pieces(parameter: Tensor, shard: Shard) -> Iterator[Part]:
    """The named slices in a parameter, or in what is like it."""
    for piece in shard.pieces:
        if piece.length:
            counts = piece.replica == 0 and shard.tied_copy != 1
            yield _part(piece, parameter, counts)


def _part(piece: Piece, parameter: Tensor, counts: bool) -> Part:
    value = piece.of(parameter).detach().double().cpu().clone()
    return Part(piece.name, piece.dim, piece.start, counts, value)
