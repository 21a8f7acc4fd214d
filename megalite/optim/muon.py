"""Muon: a matrix moves by its momentum, made orthogonal.

The whole matrix has a part in each element of that, so ranks gather what they own: first the shard
group, of which each rank has a part of the bucket, cut anywhere, then the tensor group. The
matrices of a bucket are dealt out among all these ranks; each orthogonalises its own and sends
every rank what that rank owns of them.

Sources: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024,
kellerjordan.github.io/posts/muon; Liu et al., "Muon is scalable for LLM training",
arXiv:2502.16982, for the size of the update and the weight decay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor

from megalite.config import TrainConfig
from megalite.layers.shard import Piece
from megalite.optim.buckets import Slot, Span
from megalite.optim.rule import Owned, Step
from megalite.parallel.groups import ParallelGroups

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x, x^3 and x^5. They make small values grow as fast as may be, and don't lead to 1: five steps
bring what is between 2e-3 and 1 to between 0.68 and 1.21."""

STEPS = 5

EPS = 1e-7
"""Added to a matrix's norm: one without gradients does not move."""

UPDATE_RMS = 0.2
"""Root mean square of an update without the learning rate, as AdamW's are."""


class Muon:
    """Momentum with Nesterov's look ahead, orthogonalised; decoupled weight decay.

    M = mu M + G; W = W - lr (decay W + 0.2 sqrt(max(rows, columns)) NS(G + mu M)), for each W by
    its name in the whole model, NS being `orthogonalized`. An orthogonal matrix has a root mean
    square of 1 / sqrt(max(rows, columns)): so a step is as large as one of AdamW, and learning rate
    and weight decay are the same for both.

    In collectives: an all-gather and a reduce-scatter over the shard group, and the same over the
    tensor group, for each span. They and NS are in bf16 if the model is of 16 bits, else in its
    precision; M and W in that of `Owned`. While a span is updated, some copies of its bucket are
    held, two of them of all tensor ranks.

    Args:
        train: hyper-parameters.
        groups: of this rank.
        precision: of the model.
    """

    num_moments = 1

    def __init__(self, train: TrainConfig, groups: ParallelGroups, precision: torch.dtype):
        self._momentum = train.muon_momentum
        self._tp, self._shards = groups.tp, groups.dp.shards
        self._precision = torch.bfloat16 if precision.itemsize == 2 else precision

    def update(self, owned: Owned, step: Step) -> None:
        """Take a step."""
        assert step.skip is not None and owned.out is None, "a rule of --post-validation"
        gradient = owned.gradient * step.scale.to(owned.gradient.dtype)
        momentum = gradient.add(owned.exp_avg, alpha=self._momentum)
        ahead = gradient.add_(momentum, alpha=self._momentum)
        move = self._move(owned.span, ahead.to(self._precision)).to(ahead.dtype)
        moves = step.skip == 0
        owned.exp_avg.copy_(momentum.where(moves, owned.exp_avg))
        for segment in owned.segments:
            lr = step.lr * segment.treatment.lr_scale
            master = owned.master[segment.slice]
            kept = master * (1.0 - lr * segment.treatment.weight_decay)
            master.copy_((kept - lr * move[segment.slice]).where(moves, master))
        if owned.copy is not None:
            owned.copy.copy_(owned.master)

    def _move(self, span: Span, ahead: Tensor) -> Tensor:
        """This rank's part of the bucket's update, without the learning rate, from its part of the
        momentum."""
        bucket = self._shards.start_all_gather(ahead).wait()
        buckets = self._tp.start_all_gather(bucket[None]).wait()  # [tp, bucket]
        moves = torch.zeros_like(buckets)
        matrices = list(_matrices(span.matrices))
        workers = self._tp.size * self._shards.size
        worker = self._tp.rank * self._shards.size + self._shards.rank
        for index in dealt(matrices, workers)[worker]:
            matrix = matrices[index]
            size = UPDATE_RMS * sqrt(max(matrix.piece.shape))
            matrix.put(size * orthogonalized(matrix.whole(buckets)), moves)
        # Of each matrix one rank has something to add, and the others zeros.
        (move,) = self._tp.start_reduce_scatter(moves).wait()
        return self._shards.start_reduce_scatter(move).wait()


def orthogonalized(x: Tensor) -> Tensor:
    """About U V^T of the matrix U S V^T, by five quintic steps of Newton and Schulz.

    X = x / |x|, with Frobenius' norm, so that no singular value is above 1; then five times
    X = a X + b X X^T X + c (X X^T)^2 X, which takes each singular value s to a s + b s^3 + c s^5
    and leaves U and V alone. Values near 0 become 485 times as large.

    Args:
        x: [rows, columns], of any dtype, in which it is computed.
    """
    a, b, c = COEFFICIENTS
    is_tall = x.shape[0] > x.shape[1]
    x = x.t() if is_tall else x  # X X^T is smaller
    x = x / (x.norm() + EPS)
    for _ in range(STEPS):
        square = x @ x.t()
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.t() if is_tall else x


@dataclass(frozen=True)
class Matrix:
    """A whole matrix in a bucket: its slices on all tensor ranks, which lay it out alike.

    Attributes:
        slot: of a parameter that holds a slice, its start counted from the bucket's.
        piece: the slice in it.
    """

    slot: Slot
    piece: Piece

    def slices(self, buckets: Tensor) -> list[Tensor]:
        """Views of each tensor rank's slice; `buckets` are [tp, bucket]."""
        return [self.piece.of(self.slot.of(bucket)) for bucket in buckets]

    def whole(self, buckets: Tensor) -> Tensor:
        """The matrix; of copies, which are equal, the first is taken."""
        whole = torch.cat(self.slices(buckets)[:: self.piece.replicas], self.piece.dim)
        assert whole.shape == self.piece.shape, f"{self.piece.name} is {tuple(whole.shape)}"
        return whole

    def put(self, whole: Tensor, buckets: Tensor) -> None:
        """Write every slice, copies too."""
        slices = self.slices(buckets)
        parts = whole.chunk(len(slices) // self.piece.replicas, self.piece.dim)
        for rank, view in enumerate(slices):
            view.copy_(parts[rank // self.piece.replicas])


def _matrices(slots: Sequence[Slot]) -> Iterator[Matrix]:
    """The matrices of a bucket by their names, not packed."""
    for slot in slots:
        here = replace(slot, start=slot.start - slots[0].start)
        yield from (Matrix(here, piece) for piece in slot.shard.pieces)


def dealt(matrices: Sequence[Matrix], workers: int) -> list[list[int]]:
    """Indices of the matrices that each worker orthogonalises: the most work first, each to who has
    the least so far."""
    work = [min(m.piece.shape) * m.piece.shape[0] * m.piece.shape[1] for m in matrices]
    hands: list[list[int]] = [[] for _ in range(workers)]
    for index in sorted(range(len(work)), key=lambda i: -work[i]):
        min(hands, key=lambda hand: sum(work[i] for i in hand)).append(index)
    return hands
