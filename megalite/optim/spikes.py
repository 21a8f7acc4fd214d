"""Steps whose loss or gradient norm stands out are not taken."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class SpikeGuard:
    """Tells a spike from the steps before it: a figure is one if it is more than so many standard
    deviations above its mean over the last steps. Below the mean nothing is a spike.

    The window holds every step whose figures are finite, those that were skipped too: so a lasting
    rise is taken after about window / deviations^2 steps, which widen the deviation enough. Until
    the window is full nothing is a spike.

    It lives on the device: the host neither knows it nor waits for it. It is equal on all ranks, as
    the figures are.

    Source: OLMo-core's optimizers that skip steps, `olmo_core/optim/skip_step_optimizer.py`.

    Args:
        deviations: above 0.
        window: steps, 2 at least.
        device: of the run.
    """

    def __init__(self, deviations: float, window: int, device: torch.device):
        self._deviations = deviations
        # A mean over what is not there yet is NaN, and nothing is larger than NaN.
        self._seen = torch.full((2, window), math.nan, dtype=torch.float64, device=device)

    def state(self) -> dict[str, Tensor]:
        """What later steps are compared with."""
        return {"spikes_seen": self._seen}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave; from nothing if the window is another one."""
        seen = state.get("spikes_seen")
        if seen is not None and seen.shape == self._seen.shape:
            self._seen = seen.to(self._seen.device)

    def judge(self, figures: Tensor) -> Tensor:
        """Whether a step is a spike; it is seen afterwards.

        Args:
            figures: fp64 [2], gradient norm and loss.

        Returns:
            bool []; False if a figure is not finite.
        """
        std, mean = torch.std_mean(self._seen, 1, correction=0)
        is_finite = figures.isfinite().all()
        is_spike = (figures > mean + self._deviations * std).any()
        seen = torch.cat([self._seen[:, 1:], figures[:, None]], 1)
        self._seen = seen.where(is_finite, self._seen)
        return is_spike & is_finite
