"""Muon over tensor ranks, and mistakes in it that `verify` has to find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from commands import run
from pool import RankPool
from test_sharding import small_buckets
from torch import Tensor
from worlds import make_trainer, world_groups

from megalite.config import Config
from megalite.optim import muon
from megalite.optim.muon import Matrix, Muon
from megalite.parallel.group import AxisGroup
from megalite.verification.run import Verdict, verify
from megalite.verification.shrink import shrink

Patch = pytest.MonkeyPatch


def no_fault(patch: Patch) -> None:
    """As it is."""


def without_looking_ahead(patch: Patch) -> None:
    """The momentum itself is made orthogonal."""
    right = Muon._move

    def broken(self: Any, span: Any, ahead: Tensor) -> Tensor:
        return right(self, span, seen.pop())

    seen: list[Tensor] = []
    add = Muon.update

    def marked(self: Any, owned: Any, step: Any) -> None:
        gradient = owned.gradient * step.scale
        seen.append(gradient + self._momentum * owned.exp_avg)
        add(self, owned, replace(step, scale=step.scale.to(gradient.dtype)))

    patch.setattr(Muon, "update", marked)
    patch.setattr(Muon, "_move", broken)


def four_steps(patch: Patch) -> None:
    """One step of Newton and Schulz less."""
    patch.setattr(muon, "STEPS", 4)


def size_of_the_slice(patch: Patch) -> None:
    """The update is as large as the tensor rank's slice asks for."""
    right = Matrix.put

    def broken(self: Any, whole: Tensor, buckets: Tensor) -> None:
        length, shape = self.piece.length, list(self.piece.shape)
        shape[self.piece.dim] = length
        right(self, whole * (max(shape) / max(self.piece.shape)) ** 0.5, buckets)

    patch.setattr(Matrix, "put", broken)


def each_by_all(patch: Patch) -> None:
    """Every rank orthogonalises every matrix, and the results are summed."""
    everything = lambda matrices, workers: [list(range(len(matrices)))] * workers  # noqa: E731
    patch.setattr(muon, "dealt", everything)


def ranks_in_another_order(patch: Patch) -> None:
    """The slices of tensor ranks come together from the last one."""

    def broken(self: Any, buckets: Tensor) -> Tensor:
        return torch.cat(self.slices(buckets)[:: -self.piece.replicas], self.piece.dim)

    patch.setattr(Matrix, "whole", broken)


def copies_are_not_told(patch: Patch) -> None:
    """Of ranks that share a key/value head only the first gets its update."""

    def broken(self: Any, whole: Tensor, buckets: Tensor) -> None:
        slices = self.slices(buckets)[:: self.piece.replicas]
        for view, part in zip(slices, whole.chunk(len(slices), self.piece.dim), strict=True):
            view.copy_(part)

    patch.setattr(Matrix, "put", broken)


def shards_in_another_order(patch: Patch) -> None:
    """What the shard group owns comes together from the last rank."""
    right = Muon._move

    class Reversed(AxisGroup):
        def start_all_gather(self, x: Tensor) -> Any:
            pending = super().start_all_gather(x)
            whole = pending.wait().view(self.size, -1)
            pending.tensor = whole.flip(0).reshape(-1)
            return pending

    def broken(self: Any, span: Any, ahead: Tensor) -> Tensor:
        group = self._shards
        self._shards = Reversed(group.rank, group.size, group.process_group)
        try:
            return right(self, span, ahead)
        finally:
            self._shards = group

    patch.setattr(Muon, "_move", broken)


def skipped_steps_move_the_momentum(patch: Patch) -> None:
    """It decays in a step that is skipped."""
    right = Muon.update

    def broken(self: Any, owned: Any, step: Any) -> None:
        before = owned.exp_avg.clone()
        right(self, owned, step)
        decayed = (self._momentum * before).where(step.skip != 0, owned.exp_avg)
        owned.exp_avg.copy_(decayed)

    patch.setattr(Muon, "update", broken)


def not_clipped(patch: Patch) -> None:
    """The momentum grows by gradients as they came."""
    right = Muon.update

    def broken(self: Any, owned: Any, step: Any) -> None:
        right(self, owned, replace(step, scale=torch.ones_like(step.scale)))

    patch.setattr(Muon, "update", broken)


FAULTS: dict[str, tuple[Callable[[Patch], None], str]] = {
    "without looking ahead": (without_looking_ahead, ""),
    "four steps": (four_steps, ""),
    "size of the slice": (size_of_the_slice, "--tp 4"),
    "each by all": (each_by_all, "--dp 2"),
    "ranks in another order": (ranks_in_another_order, "--tp 2"),
    "copies are not told": (copies_are_not_told, "--tp 4 --num-kv-heads 2"),
    "shards in another order": (shards_in_another_order, "--dp 2 --zero 2"),
    "skipped steps move the momentum": (skipped_steps_move_the_momentum, ""),
    "not clipped": (not_clipped, "--clip-grad 0.5"),
}


SLOW = ("size of the slice", "copies are not told", "shards in another order")


def verify_job(config: Config, fault: str, precision: str) -> Verdict:
    groups = world_groups(config)
    with pytest.MonkeyPatch.context() as patch, small_buckets():
        FAULTS.get(fault, (no_fault, ""))[0](patch)
        return verify(config, groups, torch.device("cpu"), precisions=(precision,))


def verdict(pool: RankPool, flags: str, fault: str = "", precision: str = "fp64") -> Verdict:
    words = f"--device cpu --num-layers 4 --optimizer muon {flags}".split()
    config = shrink(run(*words)).config
    return pool.run(config.world_size, verify_job, config, fault, precision)[0].value


@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=[pytest.mark.full] * (f in SLOW)) for f in FAULTS]
)
def test_verify_finds_a_planted_fault(pool: RankPool, fault: str) -> None:
    """In fp64, and most of them in fp32 too: the bound of what is amplified stays below a step."""
    flags = FAULTS[fault][1]
    failed = verdict(pool, flags, fault).failed
    assert failed is not None, "it was not caught"
    assert failed.failure.first.kind == "weight" and "_proj" in failed.failure.first.name
    if flags and "--clip-grad" not in flags:
        assert failed.config.world_size > 1, "one rank makes no such mistake"
    if fault not in ("not clipped", "skipped steps move the momentum"):
        assert verdict(pool, flags, fault, "fp32").failed is not None, "not caught in fp32"


RIGHT = ["--tp 4 --num-kv-heads 2", "--tp 2 --pp 2 --schedule interleaved", "--clip-grad 0"]


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("flags", RIGHT)
def test_verify_finds_nothing_else(pool: RankPool, flags: str, precision: str) -> None:
    found = verdict(pool, flags, precision=precision)
    assert found.failed is None, found.failed
    assert max(done.worst.ratio for done in found.passes) < 0.5


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_verify_in_16_bits(pool: RankPool, precision: str) -> None:
    found = verdict(pool, "--tp 2 --dp 2", precision=precision)
    assert found.failed is None, found.failed


def counted_job(values: dict[str, Any]) -> int:
    """Matrices that this rank makes orthogonal in a step."""
    calls: list[None] = []
    right = muon.orthogonalized

    def counted(x: Tensor) -> Tensor:
        calls.append(None)
        return right(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "orthogonalized", counted)
        make_trainer(**values, optimizer="muon").train_step(0)
    return len(calls)


@pytest.mark.parametrize(
    ("layout", "each"),
    [(dict(tp=2), 14), (dict(dp=2), 14), (dict(tp=2, dp=2), 7), (dict(dp=2, zero=0), 28)],
    ids=str,
)
def test_ranks_share_the_work(pool: RankPool, layout: dict[str, Any], each: int) -> None:
    """Of 4 layers with 7 matrices each. Ranks that own all of a bucket repeat it."""
    size = layout.get("tp", 1) * layout.get("dp", 1)
    counts = [outcome.value for outcome in pool.run(size, counted_job, layout)]
    whole = each * size
    assert sum(counts) == whole
    assert max(counts) <= 1.5 * each
