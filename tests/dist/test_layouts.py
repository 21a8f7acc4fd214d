"""Whatever the layout, it trains as one rank does.

Every tensor of every step is compared with the definition (`megalite.verification`), for one rank
and for the layout; losses, gradient norms and weights of the two keep the figures of `BOUNDS` too.
The full tier runs every layout with every other option, the quick tier a pairwise sample and fewer
steps. And the public entry point, called with flags on pooled ranks, writes the losses and weights
of the one-rank run.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from commands import run
from pool import RankPool
from runs import Run, run_in_pool, worst
from worlds import world_groups

from megalite.config import Config
from megalite.verification.run import Verdict, verify
from megalite.verification.shrink import ADAM_EPS

LAYOUTS = [
    (2, 1, 1),
    (4, 1, 1),
    (1, 2, 1),
    (1, 4, 1),
    (1, 1, 2),
    (1, 1, 4),
    (2, 2, 1),
    (2, 1, 2),
    (1, 2, 2),
    (2, 2, 2),
    (4, 2, 1),
]
"""(tp, pp, dp)"""

BOUNDS = {"fp32": (1e-5, 1e-4, 1e-5), "fp64": (1e-11, 1e-10, 1e-11)}
"""(relative loss, relative gradient norm, absolute weight) by precision."""

MODEL = (
    "--num-layers 5 --hidden-size 48 --num-attention-heads 4 --ffn-hidden-size 88 --seq-length 32 "
    "--make-vocab-size-divisible-by 1 --lr 1e-3 --lr-warmup-steps 5 --init-method-std 0.06 "
    "--sample-length 0 --eval-steps 1"
).split()
"""257 tokens of vocabulary: no tp divides it."""

STEPS, SAMPLE_STEPS = 20, 6
"""Of the full tier and of the quick one: warm-up, the skipped step and decay are in both."""


@dataclass(frozen=True)
class Case:
    """One run beside its one-rank run."""

    layout: tuple[int, int, int]
    sequence_parallel: bool
    tied: bool
    kv_heads: int
    uneven: bool
    many_micro_batches: bool
    schedule: str
    precision: str
    steps: int

    @property
    def world_size(self) -> int:
        return math.prod(self.layout)

    def flags(self) -> list[str]:
        tp, pp, dp = self.layout
        flags = [*self.model_flags(), "--tp", str(tp), "--pp", str(pp), "--dp", str(dp)]
        flags += ["--device", "cpu"]
        flags += ["--micro-batch-size", "1" if self.many_micro_batches else str(8 // dp)]
        flags += ["--schedule", self.schedule]
        if not self.sequence_parallel:
            flags.append("--no-sequence-parallel")
        if self.uneven and pp > 1:
            flags += ["--pp-layers", {2: "4,1", 4: "1,2,1,1"}[pp]]
        return flags

    def model_flags(self) -> list[str]:
        flags = [*MODEL, "--num-kv-heads", str(self.kv_heads), "--precision", self.precision]
        flags += ["--global-batch-size", "8", "--steps", str(self.steps)]
        flags += ["--eval-interval", str(self.steps // 2)]
        return flags + (["--tie-embeddings"] if self.tied else [])

    def __str__(self) -> str:
        tp, pp, dp = self.layout
        words = [f"tp{tp}-pp{pp}-dp{dp}", f"kv{self.kv_heads}", self.precision, self.schedule]
        words += ["sp"] * self.sequence_parallel + ["tied"] * self.tied
        words += ["uneven"] * self.uneven + ["many"] * self.many_micro_batches
        return "-".join(words)


def all_cases(steps: int) -> list[Case]:
    """Every combination in which each option has an effect; few micro-batches first."""
    cases = []
    for layout, sp, tied, kv, uneven, many, schedule, precision in itertools.product(
        LAYOUTS,
        (True, False),
        (True, False),
        (4, 2, 1),
        (False, True),
        (False, True),
        ("1f1b", "gpipe"),
        ("fp32", "fp64"),
    ):
        tp, pp, _ = layout
        if (sp and tp == 1) or (uneven and pp == 1) or (schedule == "gpipe" and pp == 1):
            continue
        cases.append(Case(layout, sp, tied, kv, uneven, many, schedule, precision, steps))
    return cases


def full_cases() -> list[Case]:
    """Every layout x sequence parallelism x tied x micro-batches x precision; the number of
    key/value heads, uneven stages and the schedule take turns."""
    always = dict.fromkeys(
        (case.layout, case.sequence_parallel, case.tied, case.many_micro_batches, case.precision)
        for case in all_cases(STEPS)
    )
    cases = []
    for turn, (layout, sp, tied, many, precision) in enumerate(always):
        pipelined = layout[1] > 1
        uneven = pipelined and turn % 2 == 1
        schedule = "gpipe" if pipelined and turn % 5 == 4 else "1f1b"
        kv_heads = (4, 2, 1)[turn % 3]
        cases.append(Case(layout, sp, tied, kv_heads, uneven, many, schedule, precision, STEPS))
    return cases


def pairwise(cases: list[Case]) -> list[Case]:
    """A small subset with every layout and every pair of option values that occurs at all (greedy).

    tp, pp and dp are options of their own in these pairs.
    """

    def pairs(case: Case) -> set:
        layout, *others = vars(case).values()
        return {layout, *itertools.combinations(enumerate([*layout, *others]), 2)}

    missing = set().union(*map(pairs, cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def verify_job(config: Config) -> Verdict:
    precision = config.train.precision
    return verify(config, world_groups(config), torch.device("cpu"), precisions=[precision])


def check(case: Case, pool: RankPool) -> None:
    config = run(*case.flags()).replace(eod_mask_loss=True, adam_eps=ADAM_EPS)
    verdict = pool.run(case.world_size, verify_job, config)[0].value
    assert verdict.failed is None, verdict.failed
    one, many = verdict.passes
    loss_bound, norm_bound, weight_bound = BOUNDS[case.precision]
    finite = [step for step in range(case.steps) if math.isfinite(one.norms[step])]
    assert len(one.losses) == len(many.losses) == case.steps == len(finite) + 1
    assert worst(list(many.losses), list(one.losses)) <= loss_bound
    norms = [[run.norms[step] for step in finite] for run in (many, one)]
    assert worst(*norms) <= norm_bound
    assert one.worst_weight + many.worst_weight <= weight_bound


@pytest.mark.parametrize("case", pairwise(all_cases(SAMPLE_STEPS)), ids=str)
def test_layout_sample(case: Case, pool: RankPool) -> None:
    check(case, pool)


@pytest.mark.full
@pytest.mark.parametrize("case", full_cases(), ids=str)
def test_layout(case: Case, pool: RankPool) -> None:
    check(case, pool)


# The public entry point


@pytest.fixture(scope="session")
def runs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layout-runs")


@pytest.fixture(scope="session")
def one_rank(pool: RankPool, runs_folder: Path) -> Callable[[tuple[str, ...]], Run]:
    """The one-rank run of a model, run once."""

    @functools.cache
    def run(model_flags: tuple[str, ...]) -> Run:
        return run_in_pool(pool, [*model_flags, "--micro-batch-size", "2"], 1, runs_folder)

    return run


def entry_cases(steps: int) -> list[Case]:
    """Each layout once in each precision; the other options take turns."""
    cases = []
    for turn, (layout, precision) in enumerate(itertools.product(LAYOUTS, BOUNDS)):
        tp, pp, _ = layout
        uneven, schedule = pp > 1 and turn % 4 == 1, "gpipe" if pp > 1 and turn % 5 == 4 else "1f1b"
        kv_heads = (4, 2, 1)[turn % 3]
        tied, many = turn % 2 == 1, turn % 3 > 0
        cases.append(Case(layout, tp > 1, tied, kv_heads, uneven, many, schedule, precision, steps))
    return cases


def check_entry(case: Case, pool: RankPool, one_rank: Callable, runs_folder: Path) -> None:
    want = one_rank(tuple(case.model_flags()))
    got = run_in_pool(pool, case.flags(), case.world_size, runs_folder)
    loss_bound, norm_bound, weight_bound = BOUNDS[case.precision]
    assert len(got.losses) == case.steps and len(got.valid_losses) == 2
    assert worst(got.losses, want.losses) <= loss_bound
    assert worst(got.grad_norms, want.grad_norms) <= norm_bound
    assert worst(got.valid_losses, want.valid_losses) <= loss_bound
    assert got.weights.keys() == want.weights.keys()
    for name, weight in want.weights.items():
        error = (got.weights[name] - weight).abs().max().item()
        assert error <= weight_bound, f"{name} differs by {error}"


@pytest.mark.parametrize(
    "case", [case for case in entry_cases(SAMPLE_STEPS) if case.precision == "fp32"], ids=str
)
def test_entry_point_sample(
    case: Case, pool: RankPool, one_rank: Callable, runs_folder: Path
) -> None:
    check_entry(case, pool, one_rank, runs_folder)


@pytest.mark.full
@pytest.mark.parametrize("case", entry_cases(STEPS), ids=str)
def test_entry_point(case: Case, pool: RankPool, one_rank: Callable, runs_folder: Path) -> None:
    check_entry(case, pool, one_rank, runs_folder)
