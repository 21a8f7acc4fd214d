"""Rules about the loss scale of fp16 runs. One part of `megalite.check`; no torch import."""

from __future__ import annotations

from collections.abc import Iterator

from megalite.config import Config

_SMALLEST = 2.0**-126
"""fp32 holds no smaller number with all its bits."""


def loss_scale(config: Config) -> Iterator[str]:
    """The scale begins where it may be, and fp32, in which it is kept, holds it."""
    scaling = config.scaling
    if scaling.min_loss_scale > scaling.initial_loss_scale:
        yield (
            f"--min-loss-scale {scaling.min_loss_scale} is above "
            f"--initial-loss-scale {scaling.initial_loss_scale}"
        )
    for name in ("loss_scale", "initial_loss_scale", "min_loss_scale"):
        value = getattr(scaling, name)
        if 0 < value < _SMALLEST:
            yield f"--{name.replace('_', '-')} {value} is below {_SMALLEST:.1e}, the least of fp32"
