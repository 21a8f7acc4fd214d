"""A run as `megalite.pretrain` makes it, without its files: what its steps took, and why.

`Trainer.fit` with a log that keeps times. Steps 1 to 3 warm up, and by 2 and 3 messages and weight
gradients are placed anew; 4 and 5 are recorded; 6 settles; the rest are timed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.data.mixture import Mixture
from megalite.data.splits import open_samples
from megalite.estimate import rank_estimates
from megalite.layers.sdpa import fastest_attention
from megalite.metrics import Reading, RunLog, peak_memory_bytes
from megalite.parallel.group import AxisGroup
from megalite.parallel.launch import Rank
from megalite.parallel.pipeline import Message, PipelineGroup
from megalite.pipeline.costs import Costs
from megalite.pipeline.trace_file import read_trace
from megalite.trainer import Trainer
from schedule_bench.case import FIRST_TIMED
from schedule_bench.figures import Figures, figures


class StepLog:
    """In place of a run's record: times and losses of its steps."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}
        self.loss = float("nan")

    def step(self, step: int, reading: Reading, _lr: float) -> None:
        """Keep what was read."""
        self.seconds[step], self.loss = reading.seconds, reading.values[1]

    def timed(self) -> list[float]:
        """Of the steps after the recorded ones [s]."""
        return [seconds for step, seconds in self.seconds.items() if step >= FIRST_TIMED]


class TimedCalls:
    """Host times of a pipeline axis's sends and receives, while it is held."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    @contextmanager
    def of(self, pp: PipelineGroup) -> Iterator[None]:
        """Every `start` is timed."""
        start = pp.start

        def timed(message: Message) -> dist.Work:
            began = time.perf_counter()
            work = start(message)
            self.seconds.append(time.perf_counter() - began)
            return work

        vars(pp)["start"] = timed
        try:
            yield
        finally:
            del vars(pp)["start"]


class TimedTrainer(Trainer):
    """A trainer that times the messages of its steps, not those sent to be measured."""

    def __init__(self, *parts: Any):
        super().__init__(*parts)
        self.calls = TimedCalls()

    def accumulate(self, step: int) -> Tensor:
        """As a trainer does."""
        with self.calls.of(self.groups.pp):
            return super().accumulate(step)


@dataclass(frozen=True)
class Measured:
    """What every rank knows of a run.

    Attributes:
        steps_s: of each timed step, the mean of the pipeline's ranks [s].
        figures: of the recorded steps.
        peak_bytes, estimate_bytes: of the rank that needs most, and what was predicted of it.
        calls_s: host times of this rank's sends and receives [s].
        loss: of the last step.
        extra: what the last argument of `train` gave.
    """

    steps_s: tuple[float, ...]
    figures: Figures
    peak_bytes: float
    estimate_bytes: int
    calls_s: tuple[float, ...]
    loss: float
    extra: Any = None

    @property
    def step_s(self) -> float:
        """Median [s]."""
        return median(self.steps_s)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median."""
        return (max(self.steps_s) - min(self.steps_s)) / self.step_s


def train(
    rank: Rank,
    mixture: Mixture,
    costs: Costs | None = None,
    then: Callable[[Trainer], Any] = lambda _: None,
) -> Measured:
    """Train, on all ranks.

    Args:
        rank: with the run's configuration: its steps, two of them recorded, and its name.
        mixture: of its samples.
        costs: of its stages, if they are known.
        then: called with the trainer after its last step.
    """
    config, groups, device = rank.config, rank.groups, rank.device
    _forget(device)
    log = StepLog()
    samples = open_samples(config, mixture)
    trainer = TimedTrainer(config, samples, groups, device, costs)
    with fastest_attention(device):
        trainer.fit(cast("RunLog", log))
        calls_s = tuple(trainer.calls.seconds)
        used = peak_memory_bytes(device)
        extra = then(trainer)
    trainer.optimizer.validate()
    trainer.flat.release()
    del trainer
    _forget(device)
    groups.wait_for_all(device)
    # One machine: the first rank's folder is everybody's.
    trace = read_trace(Path(config.run.runs) / config.run.name)
    steps_s = [fmean(t) for t in zip(*_of_ranks(groups.pp, log.timed(), device), strict=True)]
    peaks = torch.tensor(_of_ranks(groups.pp, [float(used)], device), device=device)
    for group in (groups.tp, groups.dp):
        group.all_reduce(peaks, maximum=True)
    most = int(peaks.argmax())
    return Measured(
        steps_s=tuple(steps_s),
        figures=figures(trace),
        peak_bytes=peaks.max().item(),
        estimate_bytes=rank_estimates(config)[most].total,
        calls_s=calls_s,
        loss=log.loss,
        extra=extra,
    )


def _forget(device: torch.device) -> None:
    """Free what the case before left, and count memory anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _of_ranks(group: AxisGroup, values: Sequence[float], device: torch.device) -> list[list[float]]:
    """The values of every rank of the group, on all of them."""
    found = torch.zeros(group.size, len(values), dtype=torch.float64, device=device)
    found[group.rank] = torch.tensor(values, dtype=torch.float64)
    return group.all_reduce(found).tolist()
