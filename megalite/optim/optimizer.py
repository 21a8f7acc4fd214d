"""Clipping and the AdamW update over flat buffers."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.config import TrainConfig
from megalite.optim.flat import FlatParameters
from megalite.parallel.groups import ParallelGroups
from megalite_kernels import adamw_

NORM_ROW = 4096
"""Elements whose norm is taken in the gradients' own precision."""


class Optimizer:
    """AdamW with decoupled weight decay on master weights, after clipping the global norm.

    Master weights and both moments are fp32 (fp64 in fp64 runs). For bf16 parameters the master
    weights are a buffer of their own; otherwise they are the parameters themselves. Per parameter
    of a bf16 run: 2 bytes of weight, 4 of gradient, 12 of master weight and moments.

    Nothing here waits for the GPU: the update kernel reads the factor that clips the gradients on
    the device, and skips the step, on all ranks alike, if the norm is not finite.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", arXiv:1711.05101.

    Args:
        flat: this rank's flat buffers.
        groups: of this rank.
        train: hyper-parameters.

    Attributes:
        master, exp_avg, exp_avg_sq: flat buffers, in the order of `flat`.
        steps: fp32 [], on the device: updates so far, without those skipped.
    """

    def __init__(
        self, flat: FlatParameters, groups: ParallelGroups, train: TrainConfig
    ):
        self._flat, self._groups, self._train = flat, groups, train
        self.master = flat.parameters.to(flat.gradients.dtype)
        self.exp_avg = torch.zeros_like(self.master)
        self.exp_avg_sq = torch.zeros_like(self.master)
        self.steps = torch.zeros((), device=self.master.device)

    def clip_and_step(self, lr: float, statistics: Tensor) -> Tensor:
        """Update the parameters from the reduced gradients.

        Args:
            lr: learning rate of this step.
            statistics: fp64 [n], sums that only some pipeline ranks hold (others hold zeros); they
                ride along in the norm's collective.

        Returns:
            fp64 [1 + n] on the device: the gradient norm before clipping, and the statistics
            summed over the pipeline ranks. Equal on all ranks.
        """
        squares = self._squared_norm()
        self._groups.tp.all_reduce(squares)
        totals = self._groups.pp.all_reduce(torch.cat([squares, statistics]))
        norm = totals[0].sqrt()
        scale = None
        if self._train.clip_grad:
            scale = (self._train.clip_grad / (norm + 1e-6)).clamp(max=1.0)
        skip = (~norm.isfinite()).float()
        self.steps += 1.0 - skip
        for part, weight_decay in self._parts():
            self._update(part, lr, weight_decay, scale, skip)
        return torch.cat([norm[None], totals[1:]])

    def _parts(self) -> tuple[tuple[slice, float], ...]:
        """Where weight decay applies in the flat buffers and where it doesn't."""
        decaying = slice(0, self._flat.decaying), self._train.weight_decay
        return decaying, (slice(self._flat.decaying, None), 0.0)

    def _update(
        self, part: slice, lr: float, weight_decay: float, scale: Tensor | None, skip: Tensor
    ) -> None:
        flat, master = self._flat, self.master
        adamw_(
            master[part],
            flat.gradients[part],
            self.exp_avg[part],
            self.exp_avg_sq[part],
            self.steps,
            lr=lr,
            beta1=self._train.adam_beta1,
            beta2=self._train.adam_beta2,
            eps=self._train.adam_eps,
            weight_decay=weight_decay,
            scale=scale,
            skip=skip,
            copy=None if master is flat.parameters else flat.parameters[part],
        )

    def _squared_norm(self) -> Tensor:
        """This rank's share of the squared global norm, fp64 [1]; every element counts once."""
        slices = self._flat.counted_slices()
        if not slices:
            return torch.zeros(1, dtype=torch.float64, device=self.master.device)
        return torch.stack([_square_sum(part) for part in slices]).sum()[None]


def _square_sum(x: Tensor) -> Tensor:
    """Sum of squares of a vector of any length, fp64 [].

    Norms of short rows are exact enough in the vector's own precision, and only they are summed in
    fp64: the vector is read once, and no copy of it in fp64 is made.
    """
    whole = len(x) // NORM_ROW * NORM_ROW
    rows = torch.linalg.vector_norm(x[:whole].view(-1, NORM_ROW), dim=1)
    rest = torch.linalg.vector_norm(x[whole:])
    return rows.double().square().sum() + rest.double().square()
