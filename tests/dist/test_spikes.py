"""A step whose norm or loss stands out is skipped on all ranks alike, counted, and costs nothing
else, also where it was begun before the norm was known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from pool import RankPool
from runs import SMALL, run_in_pool
from torch import Tensor
from worlds import make_trainer, world_groups

from megalite.config import Config
from megalite.optim.spikes import SpikeGuard
from megalite.trainer import Trainer
from megalite.verification.run import Verdict, verify
from megalite.verification.shrink import SPIKE_STEP, shrink

STEPS = 10
LARGE_GRADIENT, LARGE_LOSS, NOT_FINITE = 5, 6, 8
GUARD = dict(skip_spikes=30.0, spike_window=4, steps=STEPS, lr_warmup_steps=0)


def state(trainer: Trainer) -> list[Tensor]:
    optimizer = trainer.optimizer
    optimizer.validate()
    parts = (*optimizer.master, *optimizer.exp_avg, *optimizer.exp_avg_sq, optimizer.steps)
    return [x.clone() for x in (*trainer.flat.own_parameters, *parts)]


def steps_job(values: dict[str, Any], looks: bool = True) -> dict[str, Any]:
    """Steps of which one has a large gradient on one rank, one a large loss, and one a gradient
    that is not finite; `looks`: at the state between them."""
    trainer = make_trainer(**{**GUARD, **values})
    is_last = trainer.groups.world_rank == trainer.groups.topology.world_size - 1
    statistics, stayed = [], []
    for step in range(STEPS):
        before = state(trainer) if looks else []
        loss = trainer.accumulate(step)
        if is_last and step in (LARGE_GRADIENT, NOT_FINITE):
            for part in trainer.flat.own_gradients:
                part.mul_(torch.inf if step == NOT_FINITE else 1e4)
        statistics.append(trainer.update(step, loss * (9.0 if step == LARGE_LOSS else 1.0)))
        after = state(trainer) if looks else []
        stayed.append(all(torch.equal(x, y) for x, y in zip(before, after, strict=True)))
    return dict(statistics=statistics, stayed=stayed, state=state(trainer))


LAYOUTS: list[dict[str, Any]] = [
    dict(),
    dict(tp=2),
    dict(pp=2, precision="bf16"),
    dict(dp=2, zero=2),
    dict(tp=2, pp=2, dp=2, schedule="zb-h1", tie_embeddings=True),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_spike_on_one_rank_skips_the_step_on_all(pool: RankPool, layout: dict[str, Any]) -> None:
    world = math.prod(layout.get(axis, 1) for axis in ("tp", "pp", "dp"))
    for seen in [outcome.value for outcome in pool.run(world, steps_job, layout)]:
        skipped = [step for step in range(STEPS) if seen["stayed"][step]]
        assert skipped == [LARGE_GRADIENT, LARGE_LOSS, NOT_FINITE]
        flags = [bool(figures[-1]) for figures in seen["statistics"]]
        assert [s for s in range(STEPS) if flags[s]] == [LARGE_GRADIENT, LARGE_LOSS]
        assert not seen["statistics"][NOT_FINITE][0].isfinite()
        assert seen["state"][-1] == STEPS - 3, "updates that Adam counts"


def test_without_the_option_nothing_is_skipped_for_its_size(pool: RankPool) -> None:
    (seen,) = [o.value for o in pool.run(1, steps_job, dict(skip_spikes=0.0))]
    assert [step for step in range(STEPS) if seen["stayed"][step]] == [NOT_FINITE]
    assert {len(figures) for figures in seen["statistics"]} == {3}


def test_a_spike_leaves_the_loss_scale_as_it_is(pool: RankPool) -> None:
    """In fp16 only what is not finite makes it smaller."""
    fp16 = dict(precision="fp16", initial_loss_scale=1024.0, hysteresis=1)
    (seen,) = [o.value for o in pool.run(1, steps_job, fp16)]
    assert [figures[2].item() for figures in seen["statistics"]] == [1024.0] * 9 + [512.0]
    assert sum(figures[4].item() for figures in seen["statistics"]) == 2


@pytest.mark.parametrize("layout", [dict(), dict(tp=2, precision="bf16")], ids=str)
def test_steps_begun_before_the_norm_is_known_end_alike(
    pool: RankPool, layout: dict[str, Any]
) -> None:
    values = dict(pp=2, schedule="zb-h1", clip_grad=0.0) | layout
    world = 2 * layout.get("tp", 1)
    plain = [o.value for o in pool.run(world, steps_job, values, False)]
    found = [
        o.value for o in pool.run(world, steps_job, values | dict(post_validation=True), False)
    ]
    for ours, theirs in zip(found, plain, strict=True):
        for what in ("statistics", "state"):
            for a, b in zip(ours[what], theirs[what], strict=True):
                assert torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0)), what
        assert sum(bool(figures[-1]) for figures in ours["statistics"]) == 2


def test_the_record_of_a_run_counts_them(pool: RankPool, tmp_path: Path) -> None:
    """Of so short a window many steps stand out by little."""
    flags = [*SMALL, "--skip-spikes", "0.2", "--spike-window", "2", "--lr", "1e-2"]
    run_in_pool(pool, [*flags, "--pp", "2"], 2, tmp_path)
    (path,) = tmp_path.rglob("metrics.jsonl")
    steps = [json.loads(line) for line in path.read_text().splitlines() if "grad_norm" in line]
    spikes = [bool(record.get("spike")) for record in steps]
    assert 0 < sum(spikes) < len(steps)
    assert [record["steps_skipped"] for record in steps] == [
        sum(spikes[: n + 1]) for n in range(len(steps))
    ]
    assert [bool(record.get("skipped")) for record in steps] == spikes


def verify_job(config: Config, fault: str) -> Verdict:
    groups = world_groups(config)
    right = SpikeGuard.judge

    def never(self: Any, figures: Tensor) -> Tensor:
        return right(self, figures) & False

    def of_one_rank(self: Any, figures: Tensor) -> Tensor:
        return right(self, figures) & groups.pp.is_first

    with pytest.MonkeyPatch.context() as patch:
        if fault:
            patch.setattr(SpikeGuard, "judge", {"never": never, "one rank": of_one_rank}[fault])
        return verify(config, groups, torch.device("cpu"), precisions=("fp64",))


@pytest.mark.parametrize("fault", ["", "never", "one rank"])
def test_verify_has_a_spike(pool: RankPool, fault: str) -> None:
    flags = "--device cpu --num-layers 4 --pp 2 --dp 2 --zero 1 --skip-spikes 6"
    config = shrink(run(*flags.split(), "--steps", "500")).config
    failed = pool.run(config.world_size, verify_job, config, fault)[0].value.failed
    if not fault:
        assert failed is None, failed
        return
    assert failed is not None, "it was not caught"
    first = failed.failure.first
    assert (first.step, first.kind) == (SPIKE_STEP, "weight")
    assert failed.failure.cause == "a step that --skip-spikes skips moves the weights"
