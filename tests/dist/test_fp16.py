"""fp16: all ranks scale the loss alike, an overflow skips a step everywhere and costs nothing else,
and training follows fp32."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from pool import RankPool
from runs import SMALL, read_run, run_in_pool, worst
from torch import Tensor
from worlds import make_trainer, world_groups

from megalite import pretrain
from megalite.config import Config
from megalite.config_scaling import ScalingConfig
from megalite.optim.optimizer import Optimizer
from megalite.optim.scaler import DynamicLossScale
from megalite.trainer import Trainer
from megalite.verification.run import Verdict, verify
from megalite.verification.shrink import LOSS_SCALE, shrink

FP16: dict[str, Any] = dict(precision="fp16", hysteresis=1, loss_scale_window=3)


@contextmanager
def overflow(trainer: Trainer, world_rank: int) -> Iterator[None]:
    """One gradient of one rank, of a norm weight, is infinite."""
    if trainer.groups.world_rank != world_rank:
        yield
        return
    parameter = trainer.flat.slots[-1].parameter
    handle = parameter.register_hook(lambda gradient: gradient * torch.inf)
    yield
    handle.remove()


def state(trainer: Trainer) -> list[Tensor]:
    optimizer = trainer.optimizer
    optimizer.validate()
    buffers = (optimizer.master, optimizer.exp_avg, optimizer.exp_avg_sq)
    return [trainer.flat.whole(trainer.flat.own_parameters), *map(torch.cat, buffers)]


def overflow_job(values: dict[str, Any]) -> dict[str, Any]:
    """Six steps, of which the second overflows on the last rank."""
    trainer = make_trainer(steps=6, **FP16, **values)
    last = trainer.groups.topology.world_size - 1
    statistics, scales, updates, stayed = [], [], [], []
    for step in range(6):
        before = state(trainer)
        with overflow(trainer, last if step == 1 else -1):
            statistics.append(trainer.train_step(step).tolist())
        scales.append(trainer.optimizer.loss_scale.value.item())
        updates.append(trainer.optimizer.steps.item())
        stayed.append([torch.equal(x, y) for x, y in zip(before, state(trainer), strict=True)])
    return dict(statistics=statistics, scales=scales, updates=updates, stayed=stayed)


LAYOUTS: list[dict[str, Any]] = [
    *(dict(tp=2), dict(pp=2), dict(dp=2)),
    dict(tp=2, pp=2, dp=2, schedule="zb-h1", tie_embeddings=True),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_overflow_on_one_rank_skips_the_step_on_all(
    pool: RankPool, layout: dict[str, Any]
) -> None:
    world = math.prod(layout.get(axis, 1) for axis in ("tp", "pp", "dp"))
    outcomes = [outcome.value for outcome in pool.run(world, overflow_job, layout)]
    for seen in outcomes:
        assert [seen["scales"], seen["updates"]] == [
            # Halved by the overflow, doubled by three steps in a row without.
            [65536, 32768, 32768, 32768, 65536, 65536],
            [1, 1, 2, 3, 4, 5],
        ]
        assert seen["stayed"] == [[step == 1] * 4 for step in range(6)]
        norms, losses, scales, _ = zip(*seen["statistics"], strict=True)
        assert [math.isfinite(norm) for norm in norms] == [step != 1 for step in range(6)]
        assert all(5 < loss < 6 for loss in losses), "unscaled"
        assert list(scales) == [65536, 65536, 32768, 32768, 32768, 65536], "those of the steps"
        first = outcomes[0]["statistics"]
        assert seen["statistics"][0] == first[0] and seen["statistics"][2:] == first[2:]


def one_rank_job(skips: bool) -> list[Any]:
    """Three steps; the second is skipped, by an overflow or by not being taken."""
    trainer = make_trainer(steps=6, **FP16 | dict(hysteresis=9), global_batch_size=4)
    trainer.train_step(0)
    if skips:
        with overflow(trainer, 0):
            trainer.train_step(1)
    return [trainer.train_step(2), *state(trainer)]


def test_what_comes_after_an_overflow_is_as_if_the_step_had_not_been_taken(pool: RankPool) -> None:
    one, other = (pool.run(1, one_rank_job, skips)[0].value for skips in (True, False))
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def records(runs: Path) -> list[dict[str, Any]]:
    """Of the steps of the only run in a folder."""
    (file,) = runs.glob("*/metrics.jsonl")
    found = map(json.loads, file.read_text().splitlines())
    return [record for record in found if "loss" in record]


@pytest.mark.parametrize(
    "layout", ["--dp 1", pytest.param("--tp 2 --pp 2", marks=pytest.mark.full)]
)
def test_sixty_steps_follow_fp32(pool: RankPool, tmp_path: Path, layout: str) -> None:
    """Also where the scale grows on the way."""
    flags = [*SMALL, "--steps", "60", "--lr", "2e-3"]
    fp32 = run_in_pool(pool, flags, 1, tmp_path / "fp32")
    flags += ["--fp16", "--initial-loss-scale", "1024", "--loss-scale-window", "16"]
    world = 4 if "tp" in layout else 1
    fp16 = run_in_pool(pool, [*flags, *layout.split()], world, tmp_path / "fp16")
    assert worst(fp16.losses, fp32.losses) <= 2e-3
    assert fp32.losses[-1] < 0.75 * fp32.losses[0], "it has learned"
    steps = records(tmp_path / "fp16")
    assert [step["loss_scale"] for step in steps] == [1024 * 2 ** (n // 16) for n in range(60)]
    assert {step["steps_skipped"] for step in steps} == {0}
    assert next(iter(fp16.weights.values())).dtype == torch.float16


def test_a_scale_that_begins_much_too_high_comes_down_by_itself(
    pool: RankPool, tmp_path: Path
) -> None:
    flags = [*SMALL, "--steps", "40", "--pp", "2"]
    run_in_pool(pool, [*flags, "--precision", "fp32"], 2, tmp_path / "fp32")
    flags += ["--fp16", "--initial-loss-scale", f"{2**40}"]
    found = run_in_pool(pool, flags, 2, tmp_path / "fp16")
    steps, theirs = records(tmp_path / "fp16"), records(tmp_path / "fp32")
    skipped = [step.get("skipped", False) for step in steps]
    first = skipped.index(False)
    assert 14 < first < 25 and sum(skipped[first:]) <= 2, "it fits from here on, or nearly"
    # The first overflow is borne by the hysteresis.
    scales = [2.0 ** (40 - max(0, sum(skipped[:n]) - 1)) for n in range(40)]
    assert [step["loss_scale"] for step in steps] == scales
    assert steps[-1]["steps_skipped"] == sum(skipped)
    assert worst(found.losses[:1], [theirs[0]["loss"]]) < 1e-3, "unscaled"
    assert found.losses[-1] < min(found.losses[:first]) - 0.1, "it learns"
    # Skipped steps have had their data and their learning rates.
    for name in ("step", "tokens", "lr"):
        assert [step[name] for step in steps] == [step[name] for step in theirs]
    assert f"{sum(skipped)} skipped" in found.stdout and "gradient not finite" in found.stdout


def gradients_job(values: dict[str, Any]) -> dict[str, Tensor]:
    """The loss's own gradients, by name of the first tensor packed in each."""
    trainer = make_trainer(init_method_std=1e-3, global_batch_size=64, **values)
    trainer.accumulate(0)
    flat = trainer.flat
    gradients = flat.whole(flat.own_gradients) / trainer.optimizer.loss_scale.value
    return {slot.shard.pieces[0].name: slot.of(gradients) for slot in trainer.flat.slots}


def test_gradients_that_vanish_without_scaling_survive_with_it(pool: RankPool) -> None:
    """Of an MLP whose weights are so small that its gradients are near 1e-7."""
    name = "model.layers.1.mlp.gate_proj.weight"
    right, unscaled, scaled = (
        pool.run(1, gradients_job, values)[0].value[name]
        for values in (
            dict(precision="fp32"),
            dict(precision="fp16", loss_scale=1.0),
            dict(precision="fp16"),
        )
    )
    assert 1e-8 < right.abs().max() < 1e-6 and right.count_nonzero() == right.numel()
    assert unscaled.count_nonzero() == 0
    assert scaled.count_nonzero() == scaled.numel()
    assert (scaled - right).norm() < 2e-3 * right.norm()


# Multiplying by powers of two is exact in fp32


def no_fault(patch: pytest.MonkeyPatch) -> None:
    """As it is."""


def scale_left_in_the_update(patch: pytest.MonkeyPatch) -> None:
    """The weights move by the gradients of the scaled loss."""
    right = Optimizer._update

    def broken(self: Any, lr: float, step: Tensor, scale: Tensor, *flags: Tensor | None) -> None:
        right(self, lr, step, scale * LOSS_SCALE, *flags)

    patch.setattr(Optimizer, "_update", broken)


def scale_of_the_first_step(patch: pytest.MonkeyPatch) -> None:
    """The loss does not see that the scale changes."""
    right = Trainer._token_weights

    def broken(self: Any, micro_batch: Any, scale: Tensor) -> Tensor:
        return right(self, micro_batch, scale / self.optimizer.loss_scale.value * LOSS_SCALE)

    patch.setattr(Trainer, "_token_weights", broken)


FAULTS = {"": no_fault, "update": scale_left_in_the_update, "loss": scale_of_the_first_step}


def exact_job(values: dict[str, Any], scaled: bool, fault: str = "") -> list[Tensor]:
    """Six steps in fp32, of which the fourth overflows, with or without a loss scale that moves."""
    trainer = make_trainer(steps=6, lr=1e-2, clip_grad=2.0, **values)
    if scaled:
        scaling = ScalingConfig(0.0, LOSS_SCALE, 1.0, 1, 1)
        trainer.optimizer.loss_scale = DynamicLossScale(scaling, torch.device("cpu"))
    statistics = []
    with pytest.MonkeyPatch.context() as patch:
        FAULTS[fault](patch)
        for step in range(6):
            with overflow(trainer, 0 if step == 3 else -1):
                statistics.append(trainer.train_step(step))
        trainer.optimizer.validate()
    assert trainer.optimizer.loss_scale.value.item() == (LOSS_SCALE * 2**4 if scaled else 1)
    return [*statistics, *state(trainer)]


def bits_are_equal(pool: RankPool, layout: dict[str, Any], fault: str = "") -> bool:
    """Whether the scale leaves no trace; a norm that is not finite equals another one."""
    world = math.prod(layout.get(axis, 1) for axis in ("tp", "pp", "dp"))
    plain, scaled = (
        [outcome.value for outcome in pool.run(world, exact_job, layout, *args)]
        for args in ((False,), (True, fault))
    )
    assert any(norm[0] > 2 for norm in plain[0][:6]) and any(norm[0] < 2 for norm in plain[0][:6])
    return all(
        torch.equal(x.nan_to_num(-1, -1), y.nan_to_num(-1, -1))
        for one, other in zip(plain, scaled, strict=True)
        for x, y in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(
    "layout", [{}, dict(tp=2, pp=2), dict(pp=2, dp=2, post_validation=True)], ids=str
)
def test_a_loss_scale_leaves_no_trace_in_fp32(pool: RankPool, layout: dict[str, Any]) -> None:
    assert bits_are_equal(pool, layout)


@pytest.mark.parametrize("fault", list(FAULTS)[1:])
def test_a_planted_fault_leaves_one(pool: RankPool, fault: str) -> None:
    assert not bits_are_equal(pool, {}, fault)


# The verification


def verify_job(config: Config, fault: str) -> Verdict:
    groups = world_groups(config)
    with pytest.MonkeyPatch.context() as patch:
        FAULTS[fault](patch)
        return verify(config, groups, torch.device("cpu"), precisions=("fp16",))


@pytest.mark.parametrize("flags", ["--tp 2 --pp 2", "--dp 2 --loss-scale 8"])
def test_verify_raises_no_alarm(pool: RankPool, flags: str) -> None:
    config = shrink(run("--device", "cpu", "--fp16", *flags.split())).config
    verdict = pool.run(config.world_size, verify_job, config, "")[0].value
    assert verdict.failed is None, verdict.failed
    assert 1e-4 < max(result.worst.ratio for result in verdict.passes) < 0.5


def test_verify_finds_a_loss_with_another_scale(pool: RankPool) -> None:
    config = shrink(run("--device", "cpu", "--fp16", "--pp", "2")).config
    failed = pool.run(config.world_size, verify_job, config, "loss")[0].value.failed
    assert failed is not None and failed.failure.first.kind == "loss"


# At length


def interrupted_job(argv: list[str], overflows: list[int]) -> int:
    """A run with overflows on its last rank in these steps."""
    right = Trainer.train_step

    def broken(self: Trainer, step: int) -> Tensor:
        last = self.groups.topology.world_size - 1
        with overflow(self, last if step in overflows else -1):
            return right(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", broken)
        return pretrain.main(argv)


@pytest.mark.full
def test_three_hundred_steps_end_where_fp32_ends(pool: RankPool, tmp_path: Path) -> None:
    """The preset `tiny` on the embedded corpus, in small batches; validation losses within 1%."""
    flags = "--steps 300 --dp 2 --micro-batch-size 2 --global-batch-size 4 --eval-steps 64".split()
    flags += ["--sample-length", "0"]
    overflows = [40, 41, 42, 150, 260, 299]
    argv = [*flags, "--fp16", "--loss-scale-window", "50", "--device", "cpu"]
    argv += ["--runs", str(tmp_path), "--name", "fp16"]
    outcomes = pool.run(2, interrupted_job, argv, overflows, timeout=3000)
    assert [outcome.value for outcome in outcomes] == [0, 0]
    skipped = [r["step"] - 1 for r in records(tmp_path) if r.get("skipped")]
    assert set(overflows) <= set(skipped)
    assert len(skipped) <= len(overflows) + 3, "the scale has found the largest that fits"
    losses = {"fp16": read_run(tmp_path / "fp16").valid_losses[-1]}
    for name in ("fp32", "bf16"):
        argv = [*flags, "--precision", name]
        losses[name] = run_in_pool(pool, argv, 2, tmp_path / name).valid_losses[-1]
    assert losses["fp32"] < 2.4, "it has learned more than pairs of neighbours"
    assert worst([losses["fp16"], losses["bf16"]], [losses["fp32"]] * 2) <= 0.01
