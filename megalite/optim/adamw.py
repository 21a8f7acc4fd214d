"""AdamW: each element by itself, divided by the root of its own mean square."""

from __future__ import annotations

from megalite.config import TrainConfig
from megalite.optim.rule import Owned, Step
from megalite_kernels import adamw_


class AdamW:
    """AdamW with decoupled weight decay; no rank needs to know what others own.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", arXiv:1711.05101.

    Args:
        train: hyper-parameters.
    """

    num_moments = 2

    def __init__(self, train: TrainConfig):
        self._train = train

    def update(self, owned: Owned, step: Step) -> None:
        """Take a step."""
        for segment in owned.segments:
            part, treatment, out = segment.slice, segment.treatment, owned.out
            adamw_(
                owned.master[part],
                owned.gradient[part],
                owned.exp_avg[part],
                owned.exp_avg_sq[part],
                step.number,
                lr=step.lr * treatment.lr_scale,
                beta1=self._train.adam_beta1,
                beta2=self._train.adam_beta2,
                eps=self._train.adam_eps,
                weight_decay=treatment.weight_decay,
                scale=step.scale,
                skip=step.skip,
                copy=None if owned.copy is None else owned.copy[part],
                out=None if out is None else (out[0][part], out[1][part], out[2][part]),
                run=step.run,
                draws=segment.draws,
            )
