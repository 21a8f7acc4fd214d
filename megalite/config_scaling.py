"""The fields that describe the loss scale of fp16 runs. No torch import."""

from __future__ import annotations

from dataclasses import dataclass

from megalite.option import option


@dataclass(frozen=True)
class ScalingConfig:
    """The loss scale, with --precision fp16."""

    loss_scale: float = option(
        0.0, "fp16: what the loss is multiplied by, always. 0: what fits, as follows.", metavar="X"
    )
    initial_loss_scale: float = option(65536.0, "fp16: the loss scale at first.", metavar="X")
    min_loss_scale: float = option(1.0, "fp16: the loss scale never falls below.", metavar="X")
    loss_scale_window: int = option(
        1000, "fp16: after so many steps in a row without overflow it doubles.", metavar="STEPS"
    )
    hysteresis: int = option(
        2,
        "fp16: from this overflow on, counted since it last doubled, each one halves it.",
        metavar="STEPS",
    )
