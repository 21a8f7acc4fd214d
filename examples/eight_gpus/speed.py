"""What the ranks of a layout do: train, then one step under the profiler."""

from __future__ import annotations

import math
from functools import partial

import torch
from row_table import FAILED, RowTable
from schedule_bench.measure import train
from sharding_bench.overlap import communication_ms

from eight_gpus.layouts import planned_bubble
from eight_gpus.rows import SPEED, Row
from megalite.data.mixture import Mixture
from megalite.estimate import flops_per_token
from megalite.metrics import peak_flops
from megalite.parallel.launch import Rank
from megalite.planning.shared import sum_over_ranks
from megalite.trainer import Trainer


def measure_layout(rank: Rank, *, case: str, mixture: Mixture, table: RowTable[Row]) -> int:
    """A job: the row of a layout, written by the first rank."""
    config, device = rank.config, rank.device

    def communication(trainer: Trainer) -> list[float]:
        # Reading what it recorded takes as long as it takes.
        rank.groups.activity.begin("a step under the profiler", patient=True)
        step = partial(trainer.train_step, config.train.steps - 1)
        ready = partial(rank.groups.wait_for_all, device)
        found = communication_ms(step, ready, device)
        times = torch.tensor(found, dtype=torch.float64, device=device)
        return (sum_over_ranks(times, rank.groups) / config.world_size).tolist()

    found = train(rank, mixture, then=communication)
    if rank.groups.world_rank > 0:
        return 0
    if not math.isfinite(found.loss):
        table.add(Row(SPEED, case, status=FAILED, note=f"the loss is {found.loss}"))
        return 0
    comm_ms, exposed_ms = found.extra
    on_gpu = device.type == "cuda"
    tokens_per_s = config.tokens_per_step / found.step_s / config.world_size
    peak = peak_flops(device)
    table.add(
        Row(
            op=SPEED,
            case=case,
            ranks=config.world_size,
            pp=config.parallel.pp,
            micro_batches=config.num_micro_batches,
            recompute=config.train.recompute,
            step_ms=1e3 * found.step_s,
            spread=found.spread,
            predicted_ms=1e3 * found.figures.predicted_s,
            tokens_per_s=tokens_per_s,
            mfu=flops_per_token(config) * tokens_per_s / peak if peak else None,
            planned_bubble=planned_bubble(config),
            bubble=found.figures.bubble,
            messages_ms=1e3 * found.figures.exposed * found.figures.recorded_s,
            comm_ms=comm_ms,
            comm_exposed_ms=exposed_ms,
            peak_gib=found.peak_bytes / 2**30 if on_gpu else None,
            estimate_gib=found.estimate_bytes / 2**30,
            losses=repr(found.loss),
            note=found.figures.stage_times,
        )
    )
    return 0
