"""The rule of `--trace-steps`; see `megalite.check`. No torch import."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

from megalite.config import Config
from megalite.pipeline.trace import traced_steps


def steps_to_trace(config: Config) -> Iterator[str]:
    """The run has the steps that `--trace-steps` asks for, and they follow one plan."""
    steps, count = traced_steps(config.run.trace_steps), config.run.trace_steps
    if not steps:
        return
    which = f"step {steps[0]}" if count == 1 else f"steps {steps[0]} to {steps[-1]}"
    given = f"--trace-steps {count} records {which}"
    if 0 < config.train.steps < steps[-1]:
        most = config.train.steps - steps[0] + 1
        shorter = f"--trace-steps {most} or " if most > 0 else ""
        yield (
            f"{given}, but there are {config.train.steps}; try {shorter}--steps {steps[-1]} or more"
        )
        return

    def size(step: int) -> int:
        return config.batch_sizes.size(step - 1)

    alike = bisect_right(steps, size(steps[0]), key=size)  # sizes only grow
    if alike < count:
        yield (
            f"{given}, among which the batch grows: they have no plan in common; try "
            f"--trace-steps {alike}, or leave --rampup-batch-size out"
        )
