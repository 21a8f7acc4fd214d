"""What a run's own steps say its stages cost, and what memory is left for activations."""

from __future__ import annotations

from dataclasses import replace

import torch

from megalite.config import Config
from megalite.estimate import fixed_bytes, kept_bytes
from megalite.models.stage import stage_specs
from megalite.parallel.groups import ParallelGroups
from megalite.pipeline.actions import Op
from megalite.pipeline.costs import Costs
from megalite.pipeline.recorder import Recorder

USABLE = 0.92
"""Share of a GPU's memory that a plan may fill; the rest is the libraries' and fragments."""

_TIMED = (Op.FORWARD, Op.BACKWARD, Op.INPUT_GRADIENT, Op.WEIGHT_GRADIENT)


def memory_limit(config: Config, device: torch.device) -> float:
    """What a rank may use [bytes]: `--memory-limit`, or what its GPU has; a CPU has any amount."""
    if config.parallel.memory_limit:
        return config.parallel.memory_limit * 2**30
    if device.type == "cuda":
        return USABLE * torch.cuda.get_device_properties(device).total_memory
    return float("inf")


def activation_limit(config: Config, device: torch.device) -> float:
    """What every rank has left for activations [bytes]."""
    return memory_limit(config, device) - max(fixed_bytes(config))


def recorded_costs(
    recorder: Recorder, config: Config, groups: ParallelGroups, before: Costs | None
) -> Costs:
    """Mean times of each stage's actions over the recorded steps and all ranks [s].

    All ranks call it and get the same, so that they make the same plan.

    Args:
        recorder: of this rank; it has recorded steps.
        config: of the run.
        groups: of this rank.
        before: what was measured before, for what the steps do not tell: the time of a message and
            the sizes of activations; without it messages take no time, and sizes are estimates.
    """
    specs = stage_specs(config)
    sums = torch.zeros(2, len(specs), len(_TIMED), dtype=torch.float64, device=recorder.device)
    for step in recorder.steps():
        for span in step.spans:
            place = (span.action.stage, _TIMED.index(span.action.op))
            sums[(0, *place)] += span.end - span.start
            sums[(1, *place)] += 1
    for group in (groups.tp, groups.dp, groups.pp):
        group.all_reduce(sums)
    means = (sums[0] / sums[1].clamp(min=1.0)).cpu()
    forward, backward, inputs, weights = (tuple(means[:, i].tolist()) for i in range(len(_TIMED)))
    # A stage whose backwards are all split, or all whole, says nothing of the other way.
    whole = tuple(b or i + w for b, i, w in zip(backward, inputs, weights, strict=True))
    if before is not None:
        return replace(
            before,
            forward=forward,
            backward=whole,
            input_gradient=inputs,
            weight_gradient=weights,
        )
    kept = tuple(float(kept_bytes(config, spec)) for spec in specs)
    return Costs(forward, whole, inputs, weights, 0.0, kept, kept)
