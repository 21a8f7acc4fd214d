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
        adamw_(
            owned.master,
            owned.gradient,
            owned.exp_avg,
            owned.exp_avg_sq,
            step.number,
            lr=step.lr,
            beta1=self._train.adam_beta1,
            beta2=self._train.adam_beta2,
            eps=self._train.adam_eps,
            weight_decay=step.weight_decay,
            scale=step.scale,
            skip=step.skip,
            copy=owned.copy,
            out=owned.out,
            run=step.run,
        )
