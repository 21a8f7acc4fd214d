"""The fields that describe how a run is watched and kept going. No torch import."""

from __future__ import annotations

from dataclasses import dataclass

from megalite.option import option


@dataclass(frozen=True)
class SupervisionConfig:
    """Limits, checks, and what happens after a failure."""

    max_restarts: int = option(
        0,
        "How often all ranks are started again after one has died, raised or hung.",
        metavar="TIMES",
    )
    start_timeout: float = option(
        0.0,
        "Longest start-up, first step, and whatever is neither step nor checkpoint; then it is a "
        "hang. 0: 300 seconds, or what --distributed-timeout-minutes allows.",
        metavar="SECONDS",
    )
    step_timeout: float = option(
        0.0,
        "Longest later step. 0: 100 seconds, or ten times the running median if that is more.",
        metavar="SECONDS",
    )
    save_timeout: float = option(
        0.0,
        "Longest write of weights or a checkpoint. 0: 300 seconds, and a second for every 5 MB of "
        "a rank.",
        metavar="SECONDS",
    )
    max_nonfinite_steps: int = option(
        25,
        "End the run, with exit code 4, after so many steps in a row whose loss or gradients are "
        "not finite; such steps change nothing. 0: never.",
        metavar="STEPS",
    )
    check_replicas: int = option(
        0,
        "Steps between comparisons of what data ranks hold alike, weights and optimizer states, "
        "against silent corruption. 0: none.",
        metavar="STEPS",
    )
