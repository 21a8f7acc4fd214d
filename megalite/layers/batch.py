"""What a forward pass is told beside its hidden states: samples, and the place in the run.

Legend: B micro-batch, S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Where the documents in the samples of a micro-batch begin.

    Attributes:
        starts: int64 [B, S], the position at which the document of each token begins.
        bounds: int32 [documents + 1]; document i is the tokens `bounds[i]:bounds[i + 1]` of the
            flattened [B S]. A document that runs over two samples is two.
        longest: of them [tokens].
    """

    starts: Tensor
    bounds: Tensor
    longest: int

    def positions(self) -> Tensor:
        """Of each token in its document, int64 [B, S]."""
        return torch.arange(self.starts.shape[1], device=self.starts.device) - self.starts

    def mask(self) -> Tensor:
        """Which keys each query sees: those before it in its own document. bool [B, 1, S, S]."""
        places = torch.arange(self.starts.shape[1], device=self.starts.device)
        seen = (places <= places[:, None]) & (places >= self.starts[..., None])
        return seen[:, None]


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
        documents: None if attention and positions run through the whole sample.
    """

    tokens: Tensor
    labels: Tensor
    mask: Tensor
    place: DropoutPlace | None = None
    documents: Documents | None = None
