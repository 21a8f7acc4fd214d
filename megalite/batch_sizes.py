"""How many samples each optimizer step takes: constant, or ramped up. No torch import."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Phase:
    """Steps of one batch size.

    Attributes:
        first_step: of them.
        consumed: samples of all steps before.
        size: samples of each step.
    """

    first_step: int
    consumed: int
    size: int


@dataclass(frozen=True)
class BatchSizes:
    """Samples of every step.

    With a ramp (start, increment, samples) the batch grows from `start` to `full` by equal
    increments, each after an equal share of the first `samples` samples, as in Megatron-LM
    (`num_microbatches_calculator.py`), but in whole numbers: a share may be a fraction.

    Attributes:
        full: the batch after the ramp.
        ramp: (start, increment, samples), or empty.
    """

    full: int
    ramp: tuple[int, ...] = ()

    def size(self, step: int) -> int:
        """Samples of step `step`, 0 first."""
        return self._phase(step).size

    def consumed(self, step: int) -> int:
        """Samples of all steps before step `step`."""
        phase = self._phase(step)
        return phase.consumed + (step - phase.first_step) * phase.size

    def steps_for(self, samples: int) -> int:
        """The smallest number of steps that take so many samples."""
        phase = max((p for p in self.phases if p.consumed <= samples), key=lambda p: p.first_step)
        return phase.first_step + -(-(samples - phase.consumed) // max(1, phase.size))

    @property
    def is_ramp(self) -> bool:
        """Whether the batch grows; not if the ramp breaks a rule of `megalite.check`."""
        return (
            len(self.ramp) == 3 and min(self.ramp) > 0 and self.ramp[0] + self.ramp[1] <= self.full
        )

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """All batch sizes in order."""
        if not self.is_ramp:
            return (Phase(0, 0, self.full),)
        start, increment, samples = self.ramp
        increments = (self.full - start) // increment
        phases, step, consumed = [], 0, 0
        while consumed < samples:
            done = consumed * increments // samples
            size = start + done * increment
            phases.append(Phase(step, consumed, size))
            # Until so many samples are consumed the size stays.
            until = -(-(done + 1) * samples // increments)
            steps = -(-(until - consumed) // size)
            step, consumed = step + steps, consumed + steps * size
        return (*phases, Phase(step, consumed, self.full))

    def _phase(self, step: int) -> Phase:
        first_steps = [phase.first_step for phase in self.phases]
        return self.phases[bisect_right(first_steps, step) - 1]
