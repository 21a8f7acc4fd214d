"""Every schedule trains as one rank does: `verify`'s fp64 bound, on layouts, sizes and options."""

from __future__ import annotations

import itertools

import pytest
import torch
from commands import run
from pool import RankPool
from worlds import world_groups

from megalite.config import Config
from megalite.pipeline.actions import Op
from megalite.run_plan import run_plan
from megalite.verification.run import Verdict, verify
from megalite.verification.shrink import shrink

SCHEDULES = (
    *("gpipe", "gpipe --chunks 2", "1f1b", "interleaved", "interleaved --chunks 3"),
    *("zb-h1", "zb-h2", "zb-v", "v-half", "v-min", "dualpipe-v"),
)
OPTIONS = {
    "plain": "",
    "tp2": "--tp 2",
    "tp2-whole-sequence": "--tp 2 --no-sequence-parallel",
    "dp2": "--dp 2",
    "recompute": "--recompute full",
    "tied": "--tie-embeddings",
    "tied-dp2-recompute": "--tie-embeddings --dp 2 --recompute selective",
}
COUNTS = (1, 2, 3, 4, 7, 8, 16)

Case = tuple[str, int, int, str]
"""(schedule, pp, micro-batches, option)"""

ALL: list[Case] = [
    *itertools.product(SCHEDULES, (2, 4), COUNTS, ("plain",)),
    *itertools.product(SCHEDULES, (2, 4), (3, 8), list(OPTIONS)[1:]),
]
SAMPLE: list[Case] = [
    ("gpipe --chunks 2", 2, 3, "tied"),
    ("interleaved", 4, 7, "tied"),
    ("interleaved --chunks 3", 2, 4, "recompute"),
    ("zb-h1", 2, 1, "plain"),
    ("zb-h1", 4, 3, "tied-dp2-recompute"),
    ("zb-h2", 2, 8, "tp2"),
    ("zb-v", 2, 7, "tied-dp2-recompute"),
    ("zb-v", 4, 2, "recompute"),
    ("v-half", 4, 8, "tied"),
    ("v-min", 2, 3, "tp2-whole-sequence"),
    ("dualpipe-v", 4, 4, "dp2"),
    ("dualpipe-v", 2, 16, "plain"),
]


def configuration(case: Case) -> Config:
    schedule, pp, count, option = case
    flags = f"--device cpu --pp {pp} --schedule {schedule} {OPTIONS[option]} --num-layers 12"
    small = shrink(run(*flags.split(), "--global-batch-size", "64")).config
    unit = small.train.micro_batch_size * small.parallel.dp
    return small.replace(global_batch_size=count * unit)


def verify_job(config: Config) -> Verdict:
    return verify(config, world_groups(config), torch.device("cpu"), precisions=("fp64",))


def check(pool: RankPool, case: Case) -> None:
    config = configuration(case)
    plan = run_plan(config)
    assert plan.name == case[0].split()[0]
    assert (plan.num_ranks, plan.num_micro_batches) == case[1:3]
    verdict = pool.run(config.world_size, verify_job, config)[0].value
    assert verdict.failed is None, verdict.failed
    assert len(verdict.passes) == 2, "one rank, then the layout"


def name(case: Case) -> str:
    return "-".join(str(part).replace(" --chunks ", "x") for part in case)


def test_the_sample_has_every_schedule_that_splits_backwards_and_every_option() -> None:
    split = {s for s in SCHEDULES if any(a.op is Op.WEIGHT_GRADIENT for a in actions(s))}
    assert split <= {case[0] for case in SAMPLE}
    assert {case[3] for case in SAMPLE} == set(OPTIONS)


def actions(schedule: str) -> list:
    plan = run_plan(configuration((schedule, 2, 4, "plain")))
    return [action for order in plan.ranks for action in order]


@pytest.mark.parametrize("case", SAMPLE, ids=name)
def test_a_sample(pool: RankPool, case: Case) -> None:
    check(pool, case)


@pytest.mark.full
@pytest.mark.parametrize("case", ALL, ids=name)
def test_schedule(pool: RankPool, case: Case) -> None:
    check(pool, case)
