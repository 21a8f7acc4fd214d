"""What the ranks do: train one case after the other."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch

from megalite.data.mixture import Mixture
from megalite.data.splits import open_samples
from megalite.layers.sdpa import fastest_attention
from megalite.metrics import peak_memory_bytes
from megalite.parallel.data import DataGroup
from megalite.parallel.groups import ParallelGroups
from megalite.parallel.launch import Rank
from megalite.trainer import Trainer
from sharding_bench.cases import (
    ALONE,
    HEAD,
    LEVELS,
    RIVALS,
    WARM_UPS,
    Row,
    append,
    config_of,
    formula_gib,
)
from sharding_bench.overlap import communication_ms
from sharding_bench.rival import FullyShardTrainer


def measure_cases(
    rank: Rank,
    *,
    cases: Sequence[str],
    steps: int,
    mixture: Mixture,
    path: Path,
    where: Mapping[str, str],
) -> int:
    """A job: a row of each case, printed and appended to the CSV when it is measured."""
    if rank.groups.world_rank == 0:
        print(HEAD, flush=True)
    for case in cases:
        rank.groups.activity.begin(f"case {case}", patient=True)
        if case != ALONE or rank.groups.world_rank == 0:
            row = _measure(_rank_of(case, rank), case, steps, mixture)
            if rank.groups.world_rank == 0:
                append(path, where, row)
                print(row.words(), flush=True)
        rank.groups.wait_for_all(rank.device)
    return 0


def _rank_of(case: str, rank: Rank) -> Rank:
    """The rank as the case has it: alone, or with nothing sharded."""
    config, groups = config_of(case, rank.config), rank.groups
    if case == ALONE:
        return Rank(config, ParallelGroups.solo(groups.activity), rank.device)
    if LEVELS.get(case) == 0:
        dp = groups.dp
        groups = replace(groups, dp=DataGroup(dp.rank, dp.size, dp.process_group))
    return Rank(config, groups, rank.device)


def _measure(rank: Rank, case: str, steps: int, mixture: Mixture) -> Row:
    config, device = rank.config, rank.device
    _forget(device)
    before = _allocated(device)
    with fastest_attention(device):
        if case in RIVALS:
            trainer = FullyShardTrainer(rank, mixture, gives_back=RIVALS[case])
        else:
            samples = open_samples(config, mixture)
            trainer = Trainer(config, samples, rank.groups, device)
        state = 0
        times = []
        for step in range(WARM_UPS + steps):
            begun = time.perf_counter()
            statistics = trainer.train_step(step)
            loss = statistics[1].item()
            times.append(time.perf_counter() - begun)
            if step == 1:
                state = _allocated(device) - before
        peak = peak_memory_bytes(device)
        comm, exposed = communication_ms(
            partial(trainer.train_step, WARM_UPS + steps),
            partial(rank.groups.wait_for_all, device),
            device,
        )
    if isinstance(trainer, Trainer):
        trainer.optimizer.validate()
        trainer.flat.release()
    del trainer, statistics
    timed = times[WARM_UPS:]
    step_s = median(timed)
    formula, estimate = formula_gib(config)
    return Row(
        case=case,
        tokens_per_s=config.tokens_per_step / step_s / config.world_size,
        step_ms=1e3 * step_s,
        spread=(max(timed) - min(timed)) / step_s,
        comm_ms=comm,
        exposed_ms=exposed,
        state_gib=state / 2**30,
        formula_gib=None if case in RIVALS else formula,
        peak_gib=(peak - before) / 2**30,
        estimate_gib=None if case in RIVALS else estimate,
        loss=loss,
    )


def _allocated(device: torch.device) -> int:
    """Bytes of tensors on a GPU; 0 for a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _forget(device: torch.device) -> None:
    """Free what the case before left, and count memory anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
