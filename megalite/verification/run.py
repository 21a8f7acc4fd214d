"""Run one rank and the layout beside the definition, and say whether they are the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megalite.config import Config, resolve
from megalite.parallel.data import DataGroup
from megalite.parallel.groups import ParallelGroups
from megalite.verification.bounds import in_precision
from megalite.verification.causes import likely_cause
from megalite.verification.compare import Comparison, Difference
from megalite.verification.definition import Definition
from megalite.verification.evidence import Evidence
from megalite.verification.record import RankStep, Recorder, VerificationSamples
from megalite.verification.shrink import SKIPPED_STEP, SPIKE, SPIKE_STEP


@dataclass(frozen=True)
class Failure:
    """The first thing that differs, in order of execution.

    Attributes:
        first: the difference; None if parts of the model are on no rank.
        missing: whole tensors of which a part is on no rank, or on too many.
        cause: what probably made it, in words; empty if no pattern is known.
        different, compared: how many of the tensors of that step differ.
    """

    first: Difference | None
    missing: tuple[str, ...]
    cause: str
    different: int
    compared: int


@dataclass(frozen=True)
class Pass:
    """One run compared with the definition.

    Attributes:
        config: of the run.
        losses, norms: by step, as rank 0 saw them.
        worst: what is closest to its bound, or farthest beyond.
        worst_weight: largest absolute difference of a weight after any step.
        compared: tensors.
        failure: None if all of them are within their bounds.
    """

    config: Config
    losses: tuple[float, ...]
    norms: tuple[float, ...]
    worst: Difference
    worst_weight: float
    compared: int
    failure: Failure | None


@dataclass(frozen=True)
class Verdict:
    """The passes in order; after one that failed there are no more."""

    passes: tuple[Pass, ...]

    @property
    def failed(self) -> Pass | None:
        """The pass that failed."""
        return next((p for p in self.passes if p.failure is not None), None)


def verify(
    config: Config,
    groups: ParallelGroups,
    device: torch.device,
    *,
    precisions: Sequence[str] = ("fp64", "fp32"),
    watch: bool = False,
) -> Verdict:
    """Compare runs of a configuration with the definition; all ranks of its layout call this.

    In each precision the one-rank run comes first, on rank 0, then the layout's own. A run that
    differs is repeated with its activations watched, so that what differs first is found in the
    forward if it is there.

    Args:
        config: resolved, small enough to run (`megalite.verification.shrink`).
        groups, device: of this rank.
        precisions: of the passes, in order.
        watch: watch the activations of every run.

    Returns:
        The same on every rank.
    """
    ranks = _Ranks(groups)
    passes: list[Pass] = []
    for precision in precisions:
        run = in_precision(config, precision).replace(device=device.type)
        for one in (one_rank(run), run) if groups.topology.world_size > 1 else (run,):
            result = _pass(one, groups, device, ranks, watch)
            if result.failure is not None:
                again = result if watch else _pass(one, groups, device, ranks, True)
                if again.failure is None:
                    result = _not_again(result)
                elif one is run and groups.dp.shards.size > 1:
                    result = _explained_without_shards(again, groups, device, ranks)
                else:
                    result = again
            passes.append(result)
            if result.failure is not None:
                return Verdict(tuple(passes))
    return Verdict(tuple(passes))


def _not_again(result: Pass) -> Pass:
    """A failure that did not happen again while the activations were watched."""
    assert result.failure is not None
    cause = "it did not happen again in the same run with its activations watched: look for a race"
    return replace(result, failure=replace(result.failure, cause=cause))


def _explained_without_shards(
    result: Pass, groups: ParallelGroups, device: torch.device, ranks: _Ranks
) -> Pass:
    """A failure whose cause is sought where nothing is sharded, and every rank has all of it."""
    assert result.failure is not None
    dp = DataGroup(groups.dp.rank, groups.dp.size, groups.dp.process_group)
    again = _pass(result.config.replace(zero=0), replace(groups, dp=dp), device, ranks, True)
    cause = "with --zero 0 it is right: look at what data ranks shard, and what they gather of it"
    if again.failure is not None:
        cause = again.failure.cause
    return replace(result, failure=replace(result.failure, cause=cause))


def one_rank(config: Config) -> Config:
    """The same run on one rank: more micro-batches of the same size."""
    changed = config.given().replace(
        tp=1,
        pp=1,
        dp=1,
        pp_layers=(),
        schedule="1f1b",
        chunks=0,
        sequence_parallel=False,
        num_layers=config.model.num_layers,
        global_batch_size=config.train.global_batch_size,
        precision=config.train.precision,
        device=config.parallel.device,
    )
    return resolve(changed)


def _pass(
    config: Config, groups: ParallelGroups, device: torch.device, ranks: _Ranks, watch: bool
) -> Pass:
    """One run; of a one-rank run in a larger world the other ranks learn the result."""
    who = "the layout" if config.world_size == groups.topology.world_size else "one rank"
    groups.activity.begin(f"verifying {who} in {config.train.precision}")
    result = None
    if config.world_size == groups.topology.world_size:
        result = _run(config, groups, device, ranks, watch)
    elif groups.world_rank == 0:
        solo = ParallelGroups.solo(groups.activity)
        result = _run(config, solo, device, _Ranks(solo), watch)
    return ranks.tell(result)


def _run(
    config: Config, groups: ParallelGroups, device: torch.device, ranks: _Ranks, watch: bool
) -> Pass | None:
    """Take every step and compare it; the result is on rank 0."""
    recorder = Recorder(config, groups, device, watch=watch)
    judge = _Judge(config, device) if groups.world_rank == 0 else None
    initial = ranks.gather(recorder.weights())
    if judge is not None:
        judge.initial(initial)
    for step in range(config.train.steps):
        skipped = step == SKIPPED_STEP
        factor = SPIKE if config.train.skip_spikes and step == SPIKE_STEP else 1.0
        groups.activity.at(f"step {step + 1}")
        seen = ranks.gather(recorder.step(step, poisoned=skipped, factor=factor))
        groups.activity.at(f"comparing step {step + 1}")
        if judge is not None:
            judge.step(step, seen, skipped=skipped, factor=factor, watch=watch)
    return judge.result() if judge is not None else None


class _Judge:
    """Rank 0's part: the definition beside the run."""

    def __init__(self, config: Config, device: torch.device):
        self._config = config
        self._definition = Definition(config, VerificationSamples(config), device)
        self._comparison = Comparison(config, self._definition)
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._worst: Difference | None = None
        self._worst_weight = 0.0
        self._failure: Failure | None = None

    def initial(self, ranks: Sequence[Any]) -> None:
        missing = tuple(self._comparison.missing(ranks))
        if missing:
            cause = f"{missing[0]} is on no rank, or not all of it, or counts twice"
            self._failure = Failure(None, missing, cause, len(missing), 0)
        found = self._comparison.initial(ranks)
        self._take(found, lambda _: "initial values depend on the layout")

    def step(
        self, step: int, ranks: Sequence[RankStep], *, skipped: bool, factor: float, watch: bool
    ) -> None:
        defined = self._definition.step(step, skipped=skipped, factor=factor, watch=watch)
        found = self._comparison.step(step, ranks, defined, skipped=skipped)
        batch = self._definition.batch(step)

        def cause(wrong: list[Difference]) -> str:
            evidence = Evidence(self._config, step, batch, defined, ranks, wrong)
            # Without the activations it is not known whether something went wrong before.
            return likely_cause(evidence) if watch else ""

        self._losses.append(ranks[0].loss)
        self._norms.append(ranks[0].norm)
        moved = (d.largest for d in found if d.kind == "weight")
        self._worst_weight = max(self._worst_weight, *moved)
        self._take(found, cause)

    def result(self) -> Pass:
        assert self._worst is not None, "at least one step was compared"
        return Pass(
            self._config,
            tuple(self._losses),
            tuple(self._norms),
            self._worst,
            self._worst_weight,
            self._comparison.compared,
            self._failure,
        )

    def _take(self, found: Sequence[Difference], cause: Callable[[list[Difference]], str]) -> None:
        """Keep the worst, and of the first step that differs the first difference."""
        worst = max(found, key=lambda difference: difference.ratio)
        if self._worst is None or worst.ratio > self._worst.ratio:
            self._worst = worst
        wrong = [difference for difference in found if difference.ratio > 1]
        if wrong and self._failure is None:
            self._failure = Failure(wrong[0], (), cause(wrong), len(wrong), len(found))


class _Ranks:
    """Objects between the ranks of a world, by way of the CPU."""

    def __init__(self, groups: ParallelGroups):
        self._groups = groups
        self._gloo = None
        if groups.topology.world_size > 1 and dist.get_backend() != "gloo":
            self._gloo = dist.new_group(backend="gloo")

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on rank 0; elsewhere empty."""
        if self._groups.topology.world_size == 1:
            return [value]
        found: list[Any] | None = None
        if self._groups.world_rank == 0:
            found = [None] * self._groups.topology.world_size
        dist.gather_object(value, found, 0, group=self._gloo)
        return found or []

    def tell(self, value: Any) -> Any:
        """Rank 0's value."""
        if self._groups.topology.world_size == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, 0, group=self._gloo)
        return told[0]
