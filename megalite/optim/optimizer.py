"""Clipping and the AdamW update over flat buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megalite.config import TrainConfig
from megalite.optim.flat import FlatParameters
from megalite.parallel.groups import ParallelGroups

NORM_ROW = 4096
"""Elements whose norm is taken in the gradients' own precision."""

LONGEST_TENSOR = 1 << 30
"""Elements of one tensor given to the update kernel; longer buffers are cut."""


class Optimizer:
    """AdamW with decoupled weight decay on master weights, after clipping the global norm.

    Master weights and both moments are fp32 (fp64 in fp64 runs). For bf16 parameters the master
    weights are a buffer of their own; otherwise they are the parameters themselves. Per parameter
    of a bf16 run: 2 bytes of weight, 4 of gradient, 12 of master weight and moments.

    Nothing here waits for the GPU: clipping is a multiplication by a factor on the device, and a
    norm that is not finite makes the update kernel skip the step, on all ranks alike.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", arXiv:1711.05101.

    Args:
        stages: this rank's flat buffers.
        groups: of this rank.
        train: hyper-parameters.
    """

    def __init__(
        self, stages: Sequence[FlatParameters], groups: ParallelGroups, train: TrainConfig
    ):
        self._stages, self._groups, self._train = stages, groups, train
        self.masters = [flat.parameters.to(flat.gradients.dtype) for flat in stages]
        decaying: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for flat, master in zip(stages, self.masters, strict=True):
            cut = flat.decaying
            decaying += _leaves(master[:cut], flat.gradients[:cut])
            others += _leaves(master[cut:], flat.gradients[cut:])
        self._adam = torch.optim.AdamW(
            [
                {"params": decaying, "weight_decay": train.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=train.lr,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_eps,
            fused=True,
        )

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
        if self._train.clip_grad:
            factor = (self._train.clip_grad / (norm + 1e-6)).clamp(max=1.0)
            for flat in self._stages:
                flat.gradients.mul_(factor.to(flat.gradients.dtype))
        # The fused kernel reads this flag on the device; torch's own GradScaler sets it likewise.
        self._adam.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        for flat, master in zip(self._stages, self.masters, strict=True):
            if master is not flat.parameters:
                flat.parameters.copy_(master)
        return torch.cat([norm[None], totals[1:]])

    def _squared_norm(self) -> Tensor:
        """This rank's share of the squared global norm, fp64 [1]; every element counts once."""
        slices = [part for flat in self._stages for part in flat.counted_slices()]
        if not slices:
            return torch.zeros(1, dtype=torch.float64, device=self.masters[0].device)
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


def _leaves(master: Tensor, gradients: Tensor) -> list[nn.Parameter]:
    """Views of a flat buffer as leaves with their gradients, none longer than the kernel takes."""
    leaves = []
    for part, gradient in zip(
        master.split(LONGEST_TENSOR), gradients.split(LONGEST_TENSOR), strict=True
    ):
        leaf = nn.Parameter(part, requires_grad=True)
        leaf.grad = gradient
        leaves.append(leaf)
    return leaves
