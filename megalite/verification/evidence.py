"""What is known of the first step that differs, and what the suspects ask of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megalite.config import Config
from megalite.parallel.topology import Coordinates, Topology
from megalite.verification.compare import Difference
from megalite.verification.definition import DefinedBatch, DefinedStep, Weights, loss_gradients
from megalite.verification.record import Part, RankStep


@dataclass(frozen=True)
class Evidence:
    """The first step that differs.

    Attributes:
        config: of the run.
        step: number.
        batch: the global batch.
        defined: what is right.
        ranks: what each rank saw.
        wrong: differences that rounding does not explain, in order of execution.
    """

    config: Config
    step: int
    batch: DefinedBatch
    defined: DefinedStep
    ranks: Sequence[RankStep]
    wrong: Sequence[Difference]

    @cached_property
    def topology(self) -> Topology:
        """The layout."""
        layout = self.config.parallel
        return Topology(tp=layout.tp, pp=layout.pp, dp=layout.dp)

    def place(self, world_rank: int) -> Coordinates:
        """Coordinates of a rank."""
        return self.topology.coordinates(world_rank)

    def wrong_names(self, kind: str) -> set[str]:
        """Names of the tensors of a kind that differ."""
        return {difference.name for difference in self.wrong if difference.kind == kind}

    def gradients(self, names: set[str] | None = None) -> Iterator[tuple[int, Part]]:
        """(world rank, part) of the gradients of these names."""
        for world_rank, rank in enumerate(self.ranks):
            for part in rank.gradients:
                if names is None or part.name in names:
                    yield world_rank, part

    def neighbours(self, world_rank: int, axis: str) -> tuple[int, ...]:
        """The group of an axis that holds the rank."""
        return next(g for g in self.topology.groups(axis) if world_rank in g)

    def sum_over(self, world_ranks: Sequence[int], like: Part) -> Tensor:
        """Sum of the gradients of the same slice on these ranks."""
        return torch.stack(
            [
                part.value
                for world_rank in world_ranks
                for part in self.ranks[world_rank].gradients
                if (part.name, part.start) == (like.name, like.start)
            ]
        ).sum(0)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of each data rank in this step."""
        return len(self.batch.tokens) // (
            self.config.train.micro_batch_size * self.config.parallel.dp
        )

    def micro_batches(self) -> list[list[int]]:
        """Samples of each micro-batch, by data rank and then micro-batch."""
        train, dp = self.config.train, self.config.parallel.dp
        rows = train.micro_batch_size
        return [
            [(m * dp + r) * rows + row for row in range(rows)]
            for r in range(dp)
            for m in range(self.num_micro_batches)
        ]

    def gradients_of(self, samples: Sequence[int]) -> Weights:
        """Part of the gradients that comes from some samples."""
        rows = torch.zeros(len(self.batch.tokens), dtype=torch.bool, device=self.batch.mask.device)
        rows[list(samples)] = True
        batch, tokens = self.batch.only(rows), self.batch.mask.sum()
        return loss_gradients(self.config, self.defined.before, batch, tokens)[1]

    def data_rank_samples(self, rank: int) -> list[int]:
        """Samples of one data rank."""
        count = self.num_micro_batches
        mine = self.micro_batches()[rank * count : (rank + 1) * count]
        return [sample for micro_batch in mine for sample in micro_batch]


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors are equal up to a rounding that is generous, but no coincidence."""
    scale = max(theirs.abs().max().item(), 1e-30) if theirs.numel() else 1.0
    return ours.shape == theirs.shape and bool(
        ((ours - theirs.cpu()).abs() <= _tolerance(ours) * scale).all()
    )


def same_number(ours: float, theirs: float) -> bool:
    """`same` for numbers."""
    return math.isclose(ours, theirs, rel_tol=1e-6)


def common_factor(pairs: Sequence[tuple[Tensor, Tensor]]) -> float | None:
    """The one r with ours = r theirs for all pairs; None if there is none."""
    top = sum((ours * theirs.cpu()).sum().item() for ours, theirs in pairs)
    bottom = sum(theirs.square().sum().item() for _, theirs in pairs)
    if not bottom or not math.isfinite(top):
        return None
    factor = top / bottom
    if abs(factor - 1) < 1e-6 or not all(same(ours, theirs * factor) for ours, theirs in pairs):
        return None
    return factor


def factor_in_words(factor: float, evidence: Evidence) -> str:
    """`2 times too large, as tp and the micro-batches are 2`."""
    config, count = evidence.config, evidence.num_micro_batches
    sizes: Mapping[str, int] = {
        "tp": config.parallel.tp,
        "pp": config.parallel.pp,
        "dp": config.parallel.dp,
        "the number of micro-batches": count,
        "dp x micro-batches": config.parallel.dp * count,
        "world size": config.world_size,
    }
    large = factor if factor > 1 else 1 / factor if factor > 0 else 0.0
    names = [name for name, size in sizes.items() if size > 1 and abs(size / large - 1) < 1e-5]
    text = f"{factor:.6g} times what it should be"
    if names:
        text += f"; that is {'' if factor > 1 else '1 / '}{' or '.join(names)}"
    return text


def _tolerance(ours: Tensor) -> float:
    """Values came in fp64, but may have been computed in less."""
    return 1e-9 if ours.numel() and not torch.equal(ours, ours.float().double()) else 1e-4
