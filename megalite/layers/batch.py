"""What a forward pass is told beside its hidden states: samples, and the place in the run.

Legend: B micro-batch, S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DropoutPlace:
    """Which part of the run a forward pass computes; dropout masks are a function of it.

    Attributes:
        seed, step: of the run.
        samples: int64 [B], number of each sample in the step's global batch.
    """

    seed: int
    step: int
    samples: Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one forward pass.

    Attributes:
        tokens, labels: int64 [B, S]; a label is the token after.
        mask: bool [B, S]; True where the label counts in the loss.
        place: for dropout; None in evaluation.
    """

    tokens: Tensor
    labels: Tensor
    mask: Tensor
    place: DropoutPlace | None = None
