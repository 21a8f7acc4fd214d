"""A step that begins before the last one's norm is known ends as one that waited, bit for bit."""

from __future__ import annotations

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
from megalite.optim.optimizer import Optimizer
from megalite.trainer import Trainer
from megalite.verification.run import Verdict, verify
from megalite.verification.shrink import shrink

STEPS = 9
NOT_FINITE = 6
CLIP = 2.5
"""Between the norms of these steps: the first and the last few are not clipped."""


def steps_job(values: dict[str, Any], fault: str = "", wrong: bool = False) -> dict[str, Any]:
    """Take the steps, of which one has a gradient that is not finite, and look at the end."""
    with pytest.MonkeyPatch.context() as patch:
        FAULTS[fault](patch)
        trainer = make_trainer(steps=STEPS, lr=3e-2, lr_warmup_steps=0, **values)
        if wrong:
            trainer.optimizer.guess_wrong()
        runs = count_runs(patch, trainer)
        statistics, guesses = [], []
        for step in range(STEPS):
            statistics.append(take_step(trainer, step))
            guesses.append(trainer.optimizer.is_open)
        trainer.optimizer.validate()
    optimizer = trainer.optimizer
    state = (*optimizer.master, *optimizer.exp_avg, *optimizer.exp_avg_sq, optimizer.steps)
    tensors = [trainer.flat.whole(trainer.flat.own_parameters), *state, *statistics]
    return dict(tensors=[x.clone() for x in tensors], guesses=guesses, runs=len(runs))


def take_step(trainer: Trainer, step: int) -> Tensor:
    if step != NOT_FINITE or trainer.groups.world_rank != 0:
        return trainer.train_step(step)
    parameter = trainer.flat.slots[-1].parameter
    handle = parameter.register_hook(lambda gradient: gradient * torch.inf)
    statistics = trainer.train_step(step)
    handle.remove()
    return statistics


def count_runs(patch: pytest.MonkeyPatch, trainer: Trainer) -> list[None]:
    """One entry for each time a program of a step ran."""
    runs: list[None] = []
    right = trainer.executor.run

    def counted(*args: Any) -> Any:
        runs.append(None)
        return right(*args)

    patch.setattr(trainer.executor, "run", counted)
    return runs


def no_fault(patch: pytest.MonkeyPatch) -> None:
    """As it is."""


def not_amended(patch: pytest.MonkeyPatch) -> None:
    """What was guessed stays."""
    right = Optimizer._update

    def broken(self: Any, lr: float, step: Tensor, scale: Tensor, *flags: Tensor | None) -> None:
        skip, run = flags or (None, None)
        right(self, lr, step, scale, skip, None if run is None else run * 0)

    patch.setattr(Optimizer, "_update", broken)


def not_done_again(patch: pytest.MonkeyPatch) -> None:
    """The gradients of wrongly guessed weights are taken for those of the right ones."""
    right = Optimizer.guessed_wrong

    def broken(self: Any) -> bool:
        right(self)
        return False

    patch.setattr(Optimizer, "guessed_wrong", broken)


def amended_with_new_gradients(patch: pytest.MonkeyPatch) -> None:
    """The old gradients are forgotten before the step is amended."""
    right = Optimizer._settle

    def broken(self: Any) -> None:
        if self._open is not None and self._open.is_guessed:
            for part in self._flat.own_gradients:
                part.zero_()
        right(self)

    patch.setattr(Optimizer, "_settle", broken)


FAULTS = {
    "": no_fault,
    "not amended": not_amended,
    "not done again": not_done_again,
    "amended with new gradients": amended_with_new_gradients,
}

PLAIN = dict(pp=2, schedule="zb-h1")
LAYOUTS: list[dict[str, Any]] = [
    PLAIN,
    dict(pp=2, dp=2, zero=0, schedule="zb-h1", precision="fp64"),
    dict(pp=2, precision="bf16", moments_dtype="bf16"),
    dict(pp=2, precision="bf16-pure"),
    # Guessed steps double and halve the loss scale.
    dict(
        **dict(pp=2, schedule="zb-h1", clip_grad=0.0, precision="fp16"),
        **dict(initial_loss_scale=1024.0, loss_scale_window=3, hysteresis=1),
    ),
]
MORE: list[dict[str, Any]] = [
    dict(pp=2, tp=2, precision="bf16"),
    dict(pp=2, precision="bf16"),
    dict(pp=2, precision="fp64"),
    dict(pp=4, schedule="zb-h2", precision="bf16"),
    dict(pp=2, tp=2, schedule="zb-v", recompute="full"),
    dict(pp=2, dp=2, zero=0, schedule="interleaved", tie_embeddings=True),
    dict(pp=2, tp=2, dp=2, zero=0, schedule="dualpipe-v", precision="bf16", tie_embeddings=True),
    dict(pp=2, schedule="gpipe", hidden_dropout=0.1, attention_dropout=0.1),
    dict(pp=2, schedule="zb-h1", clip_grad=0.0),
]


def outcomes(pool: RankPool, layout: dict[str, Any], *args: Any) -> list[dict[str, Any]]:
    size = math.prod(layout.get(axis, 1) for axis in ("tp", "pp", "dp"))
    values = dict(clip_grad=CLIP) | layout
    return [outcome.value for outcome in pool.run(size, steps_job, values, *args)]


def equal(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    """NaN, the norm of the step that is skipped, equals NaN."""
    pairs = [(x["tensors"], y["tensors"]) for x, y in zip(one, other, strict=True)]
    return all(
        torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))
        for x, y in pairs
        for a, b in zip(x, y, strict=True)
    )


def check(pool: RankPool, layout: dict[str, Any]) -> None:
    plain = outcomes(pool, layout)
    guessed = outcomes(pool, layout | dict(post_validation=True))
    assert equal(plain, guessed)
    assert all(x["guesses"] == guessed[0]["guesses"] for x in guessed), "ranks agree"
    always_wrong = outcomes(pool, layout | dict(post_validation=True), "", True)
    assert equal(plain, always_wrong)
    assert {(x["runs"], *x["guesses"]) for x in always_wrong} == {(2 * STEPS - 1, *[True] * STEPS)}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bits_are_those_of_steps_that_wait(pool: RankPool, layout: dict[str, Any]) -> None:
    check(pool, layout)


@pytest.mark.full
@pytest.mark.parametrize("layout", MORE, ids=str)
def test_bits_are_those_of_steps_that_wait_in_more_layouts(
    pool: RankPool, layout: dict[str, Any]
) -> None:
    check(pool, layout)


def test_a_step_is_guessed_after_one_whose_guess_was_right(pool: RankPool) -> None:
    """And what was computed with weights of a wrong guess is computed again."""
    (found, *_) = outcomes(pool, PLAIN | dict(post_validation=True))
    norms = [statistics[0].item() for statistics in found["tensors"][-STEPS:]]
    right = [norm <= CLIP for norm in norms]
    assert found["guesses"] == [False, *right[:-1]]
    wrong = [g and not r for g, r in zip(found["guesses"], right, strict=True)]
    assert wrong[NOT_FINITE] and sum(wrong[:NOT_FINITE]) == 1, "one is clipped, one is skipped"
    assert any(g and r for g, r in zip(found["guesses"], right, strict=True))
    assert found["runs"] == STEPS + sum(wrong)
    assert sum(norm > CLIP for norm in norms) > 1 and sum(right) > 2


@pytest.mark.parametrize("fault", list(FAULTS)[1:])
def test_a_planted_fault_changes_bits(pool: RankPool, fault: str) -> None:
    plain = outcomes(pool, PLAIN)
    assert not equal(plain, outcomes(pool, PLAIN | dict(post_validation=True), fault))


def test_one_pipeline_rank_guesses_nothing(pool: RankPool) -> None:
    plain = outcomes(pool, dict(tp=2))
    found = outcomes(pool, dict(tp=2, post_validation=True))
    assert equal(plain, found)
    assert found[0]["guesses"] == [False] * STEPS


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_record_and_the_weights_of_a_run(
    pool: RankPool, tmp_path: Path, precision: str
) -> None:
    """Every step's figures arrive, in order, with validations between and samples behind."""
    flags = [*SMALL, "--pp", "2", "--schedule", "zb-h1", "--precision", precision]
    flags += "--clip-grad 2.4 --eval-interval 3 --eval-steps 1 --trace-steps 1".split()
    plain = run_in_pool(pool, flags, 2, tmp_path)
    found = run_in_pool(pool, [*flags, "--post-validation"], 2, tmp_path)
    assert found.losses == plain.losses
    assert found.grad_norms == plain.grad_norms
    assert min(plain.grad_norms) < 2.4 < max(plain.grad_norms)
    assert found.valid_losses == plain.valid_losses
    assert found.weights.keys() == plain.weights.keys()
    assert all(torch.equal(found.weights[name], w) for name, w in plain.weights.items())


def verify_job(config: Config, fault: str) -> Verdict:
    groups = world_groups(config)
    with pytest.MonkeyPatch.context() as patch:
        FAULTS[fault](patch)
        return verify(config, groups, torch.device("cpu"), precisions=("fp64",))


@pytest.mark.parametrize("fault", ["", "not amended", "amended with new gradients"])
def test_verify_compares_steps_that_were_amended(pool: RankPool, fault: str) -> None:
    flags = "--device cpu --pp 2 --tp 2 --schedule zb-h1 --post-validation --num-layers 4"
    config = shrink(run(*flags.split())).config
    assert config.train.post_validation
    verdict = pool.run(config.world_size, verify_job, config, fault)[0].value
    if not fault:
        assert verdict.failed is None, verdict.failed
    else:
        assert verdict.failed is not None, "it was not caught"
        assert verdict.failed.config.parallel.pp == 2, "not on one rank, which guesses nothing"
