"""What a row of the CSV holds, and how it is printed. No torch import."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from row_table import FAILED, MEASURED, RowTable, cell, share


@dataclass(frozen=True)
class Row:
    """One case. None: not measured. See `figures.Figures` for the shares.

    Attributes:
        op, case: what was measured.
        status: `ok`, or `failed`.
        ranks, micro_batches: of the pipeline; of a step.
        step_ms: median of the steps that were not recorded.
        spread: (slowest - fastest) / median of them.
        recorded_ms, predicted_ms: see `Figures`.
        stage_ms: the shortest forward of a stage.
        call_us, calls: host time of one send or receive call, and how many a rank makes in a step.
        memory_gib, estimate_gib: peak of the rank that needs most, and what was estimated for it.
        tokens_per_s: per rank.
        loss: of the last step; it is the same under every schedule.
        action_us, computation_us, stages_us: see `executor.OwnTime`.
        note: what else there is to say.
    """

    op: str
    case: str
    status: str = MEASURED
    ranks: int | None = None
    micro_batches: int | None = None
    step_ms: float | None = None
    spread: float | None = None
    recorded_ms: float | None = None
    predicted_ms: float | None = None
    bubble: float | None = None
    span_bubble: float | None = None
    bubble_of_1f1b: float | None = None
    cap: float | None = None
    waiting: float | None = None
    exposed: float | None = None
    stage_ms: float | None = None
    call_us: float | None = None
    calls: float | None = None
    memory_gib: float | None = None
    estimate_gib: float | None = None
    tokens_per_s: float | None = None
    loss: float | None = None
    action_us: float | None = None
    computation_us: float | None = None
    stages_us: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Measured step over predicted step."""
        if self.step_ms is None or self.predicted_ms is None:
            return None
        return self.step_ms / self.predicted_ms


class Table(RowTable[Row]):
    """The rows of one CSV; see `RowTable`."""

    def __init__(self, path: Path, where: Mapping[str, str]):
        super().__init__(path, where, Row, show)


HEAD = (
    f"{'case':<20s} {'step ms':>9s} {'spread':>6s} {'/ plan':>6s} {'bubble':>6s} {'span':>6s}"
    f" {'1F1B':>6s} {'cap':>6s} {'waits':>6s} {'comm':>6s} {'stage ms':>8s} {'call us':>7s}"
    f" {'GiB':>6s} {'est.':>6s} {'tok/s/rank':>10s} {'loss':>8s}"
)
LEGEND = (
    "/ plan: measured over predicted; bubble: of all ranks' time, the optimizer counted as busy; "
    "span: idle share of the idlest rank,\nfirst action to last; 1F1B: (p-1)/(n+p-1); cap: mean "
    "rank over slowest; waits: for messages; comm: of that after their content was made;\n"
    "stage ms: the shortest forward; call us: host time of a send or receive"
)


def show(row: Row) -> str:
    """A printed line."""
    if row.status == FAILED:
        return f"{row.case:<20s} failed: {row.note}"
    if row.computation_us is not None:
        return (
            f"{row.case:<20s} {row.computation_us:6.1f} us a computation with its messages, "
            f"{row.action_us:.1f} us an action; stage and autograd, taken off, "
            f"{row.stages_us:.1f} us"
        )
    if row.step_ms is None:
        return f"{row.case:<20s} {cell(row.call_us, 6, 1)} us a send or receive call on the host"
    shares = (row.bubble, row.span_bubble, row.bubble_of_1f1b, row.cap, row.waiting, row.exposed)
    cells = [
        cell(row.step_ms, 9, 2),
        share(row.spread),
        cell(row.ratio, 6, 3),
        *map(share, shares),
        cell(row.stage_ms, 8, 2),
        cell(row.call_us, 7, 1),
        cell(row.memory_gib, 6, 1),
        cell(row.estimate_gib, 6, 1),
        cell(row.tokens_per_s, 10, 0),
        cell(row.loss, 8, 4),
    ]
    note = f"  {row.note}" if row.note else ""
    return f"{row.case:<20s} {' '.join(cells)}{note}"


def missing(rows: Sequence[Row], op: str, cases: Iterable[str]) -> list[str]:
    """The cases without a row, failed ones among the rows."""
    there = {row.case for row in rows if row.op == op}
    return [case for case in cases if case not in there]
