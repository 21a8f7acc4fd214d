"""One start of the ranks of a layout, which train under one schedule after the other.

Each case is a run as `megalite.pretrain` makes it, without its files: `Trainer.fit` with a log that
keeps times. Steps 1 to 3 warm up, and by 2 and 3 messages and weight gradients are placed anew;
4 and 5 are recorded; 6 settles; the rest are timed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.config import Config
from megalite.data.loader import Loader
from megalite.data.mixture import Mixture
from megalite.data.splits import open_samples
from megalite.estimate import rank_estimates
from megalite.layers.dtypes import weights_dtype
from megalite.layers.sdpa import fastest_attention
from megalite.metrics import Reading, RunLog, peak_memory_bytes
from megalite.parallel.group import AxisGroup
from megalite.parallel.groups import ParallelGroups
from megalite.parallel.launch import Rank
from megalite.parallel.pipeline import Message, PipelineGroup
from megalite.pipeline.costs import Costs
from megalite.pipeline.trace_file import read_trace
from megalite.planning.choice import table
from megalite.planning.measure import measure_costs
from megalite.planning.shared import choose_on_first_rank, memory_limit
from megalite.run_plan import AUTO
from megalite.trainer import Trainer
from schedule_bench import executor
from schedule_bench.case import ALONE, FIRST_TIMED, Case
from schedule_bench.figures import figures
from schedule_bench.rows import Row, Table

CALLS = 200
"""Messages each way whose host time is measured by themselves."""


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


def measure_cases(
    rank: Rank, *, op: str, cases: Sequence[Case], mixture: Mixture, rows: Table
) -> int:
    """A job: a row of each case, written when it is measured."""
    for number, case in enumerate(cases):
        activity = rank.groups.activity
        is_alone = case.schedule == ALONE
        activity.begin(f"case {case}", patient=is_alone and not rank.groups.pp.is_first)
        row = None
        if not is_alone:
            row = _measure(rank, op, case, mixture, f"case-{number}")
        elif rank.groups.world_rank == 0:
            groups = ParallelGroups.solo(activity)
            alone = Rank(case.of(rank.config), groups, rank.device)
            row = _measure(alone, op, case, mixture, f"case-{number}")
        rank.groups.wait_for_all(rank.device)
        if rank.groups.world_rank == 0:
            assert row is not None, "this rank is in every case"
            rows.add(row)
    return 0


def _measure(rank: Rank, op: str, case: Case, mixture: Mixture, name: str) -> Row:
    """Train under a schedule; every rank gets the row."""
    config = case.of(rank.config).replace(name=name)
    groups, device = rank.groups, rank.device
    costs, note = None, ""
    if config.parallel.schedule == AUTO:
        config, costs, note = _chosen(config, groups, device, mixture)
    _forget(device)
    log = StepLog()
    samples = open_samples(config, mixture)
    trainer = TimedTrainer(config, samples, groups, device, costs)
    with fastest_attention(device):
        trainer.fit(cast("RunLog", log))
    seconds = trainer.calls.seconds
    used = peak_memory_bytes(device)
    trainer.flat.release()
    del trainer
    _forget(device)
    groups.wait_for_all(device)
    # One machine: the first rank's folder is everybody's.
    trace = read_trace(Path(config.run.runs) / name)
    steps = [fmean(times) for times in zip(*_of_ranks(groups.pp, log.timed(), device), strict=True)]
    step_s = median(steps)
    peaks = [peak for (peak,) in _of_ranks(groups.pp, [float(used)], device)]
    most = max(range(len(peaks)), key=peaks.__getitem__)
    shown = figures(trace)
    per_step = len(seconds) / config.train.steps
    return Row(
        op=op,
        case=str(case),
        ranks=config.parallel.pp,
        micro_batches=config.num_micro_batches,
        step_ms=1e3 * step_s,
        spread=(max(steps) - min(steps)) / step_s,
        recorded_ms=1e3 * shown.recorded_s,
        predicted_ms=1e3 * shown.predicted_s,
        bubble=shown.bubble,
        span_bubble=shown.span_bubble,
        bubble_of_1f1b=shown.bubble_of_1f1b,
        cap=shown.cap,
        waiting=shown.waiting,
        exposed=shown.exposed,
        stage_ms=1e3 * shown.stage_s,
        call_us=1e6 * median(seconds) if seconds else None,
        calls=per_step,
        memory_gib=peaks[most] / 2**30,
        estimate_gib=rank_estimates(config)[most].total / 2**30,
        tokens_per_s=config.tokens_per_step / step_s / config.world_size,
        loss=log.loss,
        note=f"{note}; {shown.stage_times}" if note else shown.stage_times,
    )


def _chosen(
    config: Config, groups: ParallelGroups, device: torch.device, mixture: Mixture
) -> tuple[Config, Costs, str]:
    """What `--schedule auto` takes, as `megalite.pretrain` chooses it."""
    train, valid, _ = open_samples(config, mixture)
    micro_batch = Loader(config, train, valid, groups.dp, device).train_batch(0).micro_batches[0]
    dtype = weights_dtype(config)
    costs = measure_costs(config, groups, device, dtype, micro_batch)
    limit = memory_limit(config, groups, device)
    best, choices = choose_on_first_rank(config, costs, limit, groups, device)
    if groups.world_rank == 0:
        print(table(choices, best, "ms", 1e3), flush=True)
    parallel = best.config.parallel
    return best.config, best.costs, f"chose {parallel.schedule}/{parallel.chunks}"


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


def measure_executor(rank: Rank, *, op: str, cases: Sequence[Case], count: int, rows: Table) -> int:
    """A job: the executor's own time under each schedule, and that of sends and receives."""
    groups, device = rank.groups, rank.device
    groups.activity.begin("the executor's own time", patient=True)
    if groups.world_rank == 0:
        torch.set_num_threads(1)
        for case in cases:
            own = executor.own_time(
                case.schedule, groups.pp.size, count, case.chunks, activity=groups.activity
            )
            rows.add(
                Row(
                    op=op,
                    case=str(case),
                    ranks=groups.pp.size,
                    micro_batches=count,
                    action_us=1e6 * own.action_s,
                    computation_us=1e6 * own.computation_s,
                    stages_us=1e6 * own.stages_s,
                )
            )
    groups.wait_for_all(device)
    call_us = 1e6 * _call_s(groups.pp, device, rank.config)
    if groups.world_rank == 0:
        size = groups.pp.size
        rows.add(Row(op=op, case=MESSAGES, ranks=size, micro_batches=count, call_us=call_us))
    return 0


MESSAGES = "messages"
"""The case of sends and receives by themselves."""


def _call_s(pp: PipelineGroup, device: torch.device, config: Config) -> float:
    """Host time of a call that sends or receives the hidden states of a micro-batch [s]."""
    shape = (config.model.seq_length, config.train.micro_batch_size, config.model.hidden_size)
    hidden = torch.zeros(shape, dtype=weights_dtype(config), device=device)
    calls = TimedCalls()
    with calls.of(pp):
        for _ in range(CALLS):
            for later in (True, False):
                for work in _pass_on(pp, hidden, later):
                    work.wait()
    return median(calls.seconds)


def _pass_on(pp: PipelineGroup, hidden: torch.Tensor, later: bool) -> list[dist.Work]:
    """A message to the next rank in one direction, and one from the rank before."""
    step = 1 if later else -1
    sides = ((pp.rank + step, True), (pp.rank - step, False))
    return [
        pp.start(Message(hidden.clone(), peer, is_send, later))
        for peer, is_send in sides
        if 0 <= peer < pp.size
    ]
