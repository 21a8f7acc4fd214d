"""What the loss is multiplied by before the backward, so that gradients fit into their precision.

fp16 rounds what is below 2^-25 to zero, and gradients of a mean over many tokens lie there. With a
loss of S times its size each gradient has S times its own, and what is not finite shows that S was
too large. The optimizer divides by S again, in the factor that clips the gradients: that is free.

Source: Micikevicius et al., "Mixed precision training", arXiv:1710.03740, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megalite.config import Config
from megalite.config_scaling import ScalingConfig

LARGEST = 2.0**24
"""The scale does not grow beyond: it would bring fp16's least number, 2^-24, to 1."""


class LossScale:
    """A loss scale that stays as it is.

    Args:
        value: above 0; 1 scales nothing.
        device: of the run.

    Attributes:
        value: fp32 [], of the step under way. A new one is another tensor.
    """

    def __init__(self, value: float, device: torch.device):
        self.value = torch.full((), value, dtype=torch.float32, device=device)

    def update(self, skip: Tensor) -> None:
        """A step has ended.

        Args:
            skip: [], not 0 if its gradients were not finite; equal on all ranks, so that the scale
                is too.
        """

    def state(self) -> dict[str, Tensor]:
        """What the next step's scale follows from, by name; nothing of one that stays."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave; without it, from the beginning."""


class DynamicLossScale(LossScale):
    """A loss scale as large as gradients allow, found by trial.

    It doubles after `loss_scale_window` steps in a row whose gradients were finite. Of the steps
    whose gradients were not, the first `hysteresis` - 1 since it last doubled leave it as it is,
    and each one after those halves it. It stays between the minimum and `LARGEST`, unless it began
    beyond.

    It lives on the device: the host neither knows it nor waits for it.

    Source: Megatron-LM, `megatron/core/optimizer/grad_scaler.py`, which has no upper limit.

    Args:
        scaling: its numbers.
        device: of the run.
    """

    def __init__(self, scaling: ScalingConfig, device: torch.device):
        super().__init__(scaling.initial_loss_scale, device)
        self._scaling = scaling
        self._finite = torch.zeros((), dtype=torch.int64, device=device)
        self._borne = torch.full((), scaling.hysteresis, dtype=torch.int64, device=device)

    def update(self, skip: Tensor) -> None:
        """A step has ended; arguments as in `LossScale`."""
        scaling, overflowed = self._scaling, skip != 0
        finite = (self._finite + 1).where(~overflowed, 0)
        borne = self._borne - overflowed.long()
        grows = finite == scaling.loss_scale_window
        shrinks = overflowed & (borne <= 0)
        doubled = (2 * self.value).where(2 * self.value <= LARGEST, self.value)
        halved = (self.value / 2).clamp(min=scaling.min_loss_scale)
        self.value = doubled.where(grows, halved.where(shrinks, self.value))
        self._finite = finite.where(~grows, 0)
        self._borne = borne.where(~grows, scaling.hysteresis)

    def state(self) -> dict[str, Tensor]:
        """As of `LossScale`."""
        return {
            "loss_scale": self.value,
            "loss_scale_finite": self._finite,
            "loss_scale_borne": self._borne,
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """As of `LossScale`."""
        if self.state().keys() <= state.keys():
            device = self.value.device
            self.value = state["loss_scale"].to(device)
            self._finite = state["loss_scale_finite"].to(device)
            self._borne = state["loss_scale_borne"].to(device)


def make_loss_scale(config: Config, device: torch.device) -> LossScale:
    """The loss scale of a run; 1 for precisions whose exponents have the range of fp32 or more."""
    if config.train.precision != "fp16":
        return LossScale(1.0, device)
    if config.scaling.loss_scale:
        return LossScale(config.scaling.loss_scale, device)
    return DynamicLossScale(config.scaling, device)
