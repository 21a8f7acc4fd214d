"""What an optimizer's rule is asked: how the weights of a span follow from their gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megalite.optim.buckets import Span
from megalite.optim.segments import Segment


@dataclass(frozen=True)
class Owned:
    """What a rank owns of a span; all flat, of its length, fp32 (fp64 in fp64 runs) unless said.

    Attributes:
        span: where it lies.
        segments: of it, with their rates and decays.
        master: weights.
        gradient: as it was summed, not clipped, times the loss scale.
        exp_avg, exp_avg_sq: moments; those that the rule doesn't keep are empty.
        copy: in the precision of the model, gets the new weights too; None: `master` is that.
        out: like master and moments, get the new ones, and the old ones stay. None: in place.
    """

    span: Span
    segments: tuple[Segment, ...]
    master: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    copy: Tensor | None
    out: tuple[Tensor, Tensor, Tensor] | None


@dataclass(frozen=True)
class Step:
    """What all elements of a span have in common in a step; tensors are [] and on the device.

    Attributes:
        number: of this step, 1 first, those skipped not counted.
        lr: learning rate, which segments scale.
        scale: that gradients are multiplied by: clipping, loss scale.
        skip: unless it is 0, nothing moves. None: 0.
        run: if it is 0, nothing is written at all. None: 1.
    """

    number: Tensor
    lr: float
    scale: Tensor
    skip: Tensor | None
    run: Tensor | None


class Rule(Protocol):
    """How weights follow from gradients.

    Attributes:
        num_moments: that it keeps: 1, `exp_avg`, or 2, `exp_avg_sq` too.
    """

    num_moments: int

    def update(self, owned: Owned, step: Step) -> None:
        """Take a step. Ranks of the tensor and the shard group call it for the same spans in the
        same order; the host waits for nothing."""
        ...
