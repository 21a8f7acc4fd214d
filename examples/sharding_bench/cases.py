"""What is measured, by name, and the row that it gives. No torch import."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megalite.config import Config
from megalite.estimate import rank_estimates

ALONE = "one-rank"
"""The first rank trains by itself; the others wait."""
LEVELS = {f"zero-{level}": level for level in range(4)}
RIVALS = {"fully-shard": True, "fully-shard-2": False}
"""torch's fully_shard, and whether it gives weights back after each forward."""
CASES = (ALONE, *LEVELS, *RIVALS)

WARM_UPS = 3


@dataclass(frozen=True)
class Row:
    """One case.

    Attributes:
        case: its name.
        tokens_per_s: of each rank.
        step_ms, spread: median, and (slowest - fastest) / median.
        comm_ms, exposed_ms: of one step: time in which NCCL's kernels run, and of that the time in
            which no other kernel does.
        state_gib, formula_gib: allocated for weights, gradients and optimizer states after the
            second step, and what `megalite.estimate` says; nothing said of rivals.
        peak_gib, estimate_gib: likewise of all, at the peak.
        loss: of the last step.
    """

    case: str
    tokens_per_s: float
    step_ms: float
    spread: float
    comm_ms: float
    exposed_ms: float
    state_gib: float
    formula_gib: float | None
    peak_gib: float
    estimate_gib: float | None
    loss: float

    def words(self) -> str:
        """For people, below `HEAD`."""
        formula = f"{self.formula_gib:8.3f}" if self.formula_gib else " " * 8
        estimate = f"{self.estimate_gib:6.2f}" if self.estimate_gib else " " * 6
        return (
            f"{self.case:<14s} {self.tokens_per_s:9.0f} {self.step_ms:8.1f} {self.spread:6.1%}"
            f" {self.comm_ms:8.1f} {self.exposed_ms:8.1f} {self.state_gib:8.3f} {formula}"
            f" {self.peak_gib:6.2f} {estimate} {self.loss:9.5f}"
        )


HEAD = (
    f"{'case':<14s} {'tok/s/rank':>9s} {'step ms':>7s} {'spread':>6s} {'comm ms':>8s}"
    f" {'exposed':>8s} {'GiB':>8s} {'formula':>8s} {'peak':>6s} {'est.':>6s} {'loss':>9s}"
)


def config_of(case: str, config: Config) -> Config:
    """A run of a case; `config` is of the layout."""
    if case == ALONE:
        return config.replace(dp=1, zero=0)
    return config.replace(zero=LEVELS.get(case, 3))


def formula_gib(config: Config) -> tuple[float, float]:
    """Weights, gradients and states of a rank; and all that it needs at the peak [GiB]."""
    (estimate,) = rank_estimates(config)
    state = estimate.weights + estimate.gradients + estimate.optimizer
    return state / 2**30, estimate.total / 2**30


def append(path: Path, where: Mapping[str, str], row: Row) -> None:
    """Add a row to a CSV, with the columns `where` before it."""
    values = {**where, **dataclasses.asdict(row)}
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(values))
        if is_new:
            writer.writeheader()
        writer.writerow(values)
