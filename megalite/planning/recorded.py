"""What a run's own steps say its stages cost."""

from __future__ import annotations

from dataclasses import replace

import torch

from megalite.parallel.groups import ParallelGroups
from megalite.pipeline.actions import Op
from megalite.pipeline.costs import Costs
from megalite.pipeline.recorder import Recorder
from megalite.planning.shared import sum_over_ranks

_TIMED = (Op.FORWARD, Op.BACKWARD, Op.INPUT_GRADIENT, Op.WEIGHT_GRADIENT)


def recorded_costs(
    recorder: Recorder, groups: ParallelGroups, before: Costs, message: float
) -> Costs:
    """Mean times of each stage's actions over the recorded steps and all ranks [s].

    All ranks call it and get the same bits, so that they make the same plan.

    Args:
        recorder: of this rank; it has recorded steps.
        groups: of this rank.
        before: what the steps do not tell: the sizes of activations.
        message: time of a message as measured on this rank [s]; the mean is taken.
    """
    stages = len(before.forward)
    sums = torch.zeros(2, stages, len(_TIMED), dtype=torch.float64, device=recorder.device)
    for step in recorder.steps():
        for span in step.spans:
            place = (span.action.stage, _TIMED.index(span.action.op))
            sums[(0, *place)] += span.end - span.start
            sums[(1, *place)] += 1
    messages = torch.tensor([message, 1.0], dtype=torch.float64, device=recorder.device)
    total = sum_over_ranks(torch.cat([sums.flatten(), messages]), groups).cpu()
    sums, (message_sum, ranks) = total[:-2].view_as(sums), total[-2:].tolist()
    means = sums[0] / sums[1].clamp(min=1.0)
    forward, backward, inputs, weights = (tuple(means[:, i].tolist()) for i in range(len(_TIMED)))
    # A stage whose backwards are all split, or all whole, says nothing of the other way.
    whole = tuple(b or i + w for b, i, w in zip(backward, inputs, weights, strict=True))
    return replace(
        before,
        forward=forward,
        backward=whole,
        input_gradient=inputs,
        weight_gradient=weights,
        message=message_sum / ranks,
    )
