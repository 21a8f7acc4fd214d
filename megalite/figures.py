"""The figures of a run's steps, read a step late, and what follows from them on all ranks alike."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.config import Config
from megalite.errors import RunError
from megalite.events import Events
from megalite.exit_codes import ExitCode
from megalite.metrics import DelayedScalars, Reading, RunLog
from megalite.optim.lr import learning_rate

TIMES_S = 60.0
"""The time of steps is recorded so often at least [s]."""


@dataclass(frozen=True)
class Result:
    """How a run ended; equal on all ranks.

    Attributes:
        steps: that were taken.
        stopped: a rank was asked to stop before the last one.
        train_loss: of the last step taken [nats per token]; None: this start took none.
        valid_loss: of the last validation, None if there was none.
        test_loss: of the test after training, None if there was none.
    """

    steps: int
    stopped: bool
    train_loss: float | None
    valid_loss: float | None
    test_loss: float | None


class Figures:
    """What steps leave on the device; every rank reads the same at the same place of its loop.

    Args:
        config: the run.
        device: of this rank.
        log: on the rank that keeps the record, None on the others.
        events: likewise, of what happens.

    Attributes:
        loss: of the last step that was read [nats per token].
        is_asked: whether a rank was asked to stop before the end of a step that was read.
    """

    def __init__(self, config: Config, device: torch.device, log: RunLog | None, events: Events):
        self._config, self._log, self._events = config, log, events
        self._scalars = DelayedScalars(device)
        self._taken: deque[tuple[int, Tensor]] = deque()
        self._pushed = 0
        self._nonfinite: list[int] = []
        self._timed: list[tuple[int, float]] = []
        self._recorded = time.monotonic()
        self.loss, self.is_asked = math.nan, False

    def begin(self) -> None:
        """A step starts here."""
        self._scalars.begin()

    def end(self, step: int, statistics: Tensor) -> None:
        """Step `step`, 1 first, ends; `statistics` are those of `Trainer.train_step`."""
        self._taken.append((step, statistics))
        self._scalars.end()

    def read(self, *, is_open: bool) -> None:
        """Read the steps whose figures have arrived.

        Args:
            is_open: the last step is a guess, whose figures are there when the next one has
                validated it.

        Raises:
            RunError: too many steps in a row were not finite.
        """
        while self._taken and (len(self._taken) > 1 or not is_open):
            step, statistics = self._taken.popleft()
            before, self._pushed = self._pushed, step
            self._record(before, self._scalars.push(statistics))

    def finish(self) -> None:
        """Read all, and record the time of all steps; the last one is no guess any more.

        Raises:
            RunError: as `read`.
        """
        self.read(is_open=False)
        self._record(self._pushed, self._scalars.flush())
        self.record_times()

    def record_times(self) -> None:
        """Record the time of the steps since this was called before."""
        if self._timed:
            (first, _), (last, _) = self._timed[0], self._timed[-1]
            seconds = round(sum(seconds for _, seconds in self._timed), 3)
            self._events.write("steps", first=first, step=last, seconds=seconds)
        self._timed, self._recorded = [], time.monotonic()

    def _record(self, step: int, reading: Reading | None) -> None:
        if reading is None:
            return
        values = list(reading.values)
        votes = values.pop(3 if self._config.train.precision == "fp16" else 2)
        self.is_asked = self.is_asked or votes > 0
        norm, self.loss, *others = values
        self._timed.append((step, reading.seconds))
        if time.monotonic() - self._recorded > TIMES_S:
            self.record_times()
        if self._log is not None:
            rate = learning_rate(self._config.train, step - 1)
            self._log.step(step, Reading(values, reading.seconds), rate)
        is_finite = math.isfinite(norm) and math.isfinite(self.loss)
        self._nonfinite = [] if is_finite else [*self._nonfinite, step]
        is_spike = bool(self._config.train.skip_spikes) and others[-1] > 0
        if is_spike or not is_finite:
            first, last = self._samples(step, step)
            why = "spike" if is_spike else "not finite"
            self._events.write("skipped", step=step, why=why, samples=[first, last])
        self._give_up()

    def _give_up(self) -> None:
        most, steps = self._config.supervision.max_nonfinite_steps, self._nonfinite
        if most and len(steps) >= most:
            first, last = self._samples(steps[0], steps[-1])
            raise RunError(
                f"loss or gradients of {most} steps in a row were not finite "
                f"(--max-nonfinite-steps): steps {steps[0]} to {steps[-1]}, whose samples are "
                f"{first} to {last} of the data order; the weights are those before step "
                f"{steps[0]}. A lower --lr or --precision fp32 may help, or other data",
                ExitCode.NOT_FINITE,
            )

    def _samples(self, first: int, last: int) -> tuple[int, int]:
        """First and last sample of some steps in the order of the data, 0 first."""
        sizes = self._config.batch_sizes
        return sizes.consumed(first - 1), sizes.consumed(last) - 1
