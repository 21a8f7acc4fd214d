"""One start of the ranks of a layout, which train under one schedule after the other."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import torch
import torch.distributed as dist

from megalite.config import Config
from megalite.data.loader import Loader
from megalite.data.mixture import Mixture
from megalite.data.splits import open_samples
from megalite.layers.dtypes import weights_dtype
from megalite.parallel.groups import ParallelGroups
from megalite.parallel.launch import Rank
from megalite.parallel.pipeline import Message, PipelineGroup
from megalite.pipeline.costs import Costs
from megalite.planning.choice import table
from megalite.planning.measure import measure_costs
from megalite.planning.shared import choose_on_first_rank, memory_limit
from megalite.run_plan import AUTO
from schedule_bench import executor
from schedule_bench.case import ALONE, Case
from schedule_bench.measure import TimedCalls, train
from schedule_bench.rows import Row, Table

CALLS = 200
"""Messages each way whose host time is measured by themselves."""


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
    costs, note = None, ""
    if config.parallel.schedule == AUTO:
        config, costs, note = _chosen(config, rank.groups, rank.device, mixture)
    found = train(Rank(config, rank.groups, rank.device), mixture, costs)
    shown = found.figures
    return Row(
        op=op,
        case=str(case),
        ranks=config.parallel.pp,
        micro_batches=config.num_micro_batches,
        step_ms=1e3 * found.step_s,
        spread=found.spread,
        recorded_ms=1e3 * shown.recorded_s,
        predicted_ms=1e3 * shown.predicted_s,
        bubble=shown.bubble,
        span_bubble=shown.span_bubble,
        bubble_of_1f1b=shown.bubble_of_1f1b,
        cap=shown.cap,
        waiting=shown.waiting,
        exposed=shown.exposed,
        stage_ms=1e3 * shown.stage_s,
        call_us=1e6 * median(found.calls_s) if found.calls_s else None,
        calls=len(found.calls_s) / config.train.steps,
        memory_gib=found.peak_bytes / 2**30,
        estimate_gib=found.estimate_bytes / 2**30,
        tokens_per_s=config.tokens_per_step / found.step_s / config.world_size,
        loss=found.loss,
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
