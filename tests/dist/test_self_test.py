"""The doctor's test of the collectives finds one that is wrong, and where."""

from __future__ import annotations

import pytest
import torch
from pool import RankPool
from worlds import make_groups

from megalite.config import Config, resolve
from megalite.diagnosis import collectives
from megalite.parallel.data import DataGroup
from megalite.parallel.group import AxisGroup, Pending
from megalite.parallel.groups import ParallelGroups

CPU = torch.device("cpu")


def measured(patch: pytest.MonkeyPatch, groups: ParallelGroups) -> dict[str, str]:
    patch.setattr(collectives, "CPU_SIZES", (1 << 16,))
    patch.setattr(collectives, "LATENCY_REPEATS", 2)
    config = resolve(Config().replace(dp=4))
    found = collectives.measure_collectives(config, groups, CPU)
    return {one.verb: one.problem for one in found}


def faults_job() -> None:
    groups = make_groups(dp=4)
    rank = groups.world_rank
    with pytest.MonkeyPatch.context() as patch:
        assert set(measured(patch, groups).values()) == {""}
        right = AxisGroup.start_all_gather

        def swapped(self: AxisGroup, x: torch.Tensor) -> Pending:
            whole = right(self, x).wait()
            return Pending(whole.roll(len(x)) if rank == 2 else whole)

        patch.setattr(DataGroup, "start_all_gather", swapped)
        problems = {verb: problem for verb, problem in measured(patch, groups).items() if problem}
        assert set(problems) == ({"all_gather"} if rank == 2 else set())
        assert rank != 2 or "values are wrong; the first, at 0, is" in problems["all_gather"]


def test_a_wrong_collective_is_named(pool: RankPool) -> None:
    pool.run(4, faults_job)
