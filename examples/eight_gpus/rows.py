"""What a row of the CSV holds, how it is printed. No torch import."""

from __future__ import annotations

from dataclasses import dataclass

from row_table import FAILED, MEASURED, cell, share

SPEED, LOSSES = "speed", "losses"


@dataclass(frozen=True)
class Row:
    """One layout. None: not measured.

    Attributes:
        op, case: what was measured; a case is a layout's flags, or `one rank`.
        ranks, pp, micro_batches: of the layout; the last one of each data rank.
        recompute: as for `--recompute`.
        step_ms, spread: median of the timed steps, and (slowest - fastest) / median.
        predicted_ms: of a step, as simulated with the stages' times in the same run.
        tokens_per_s: of each GPU.
        mfu: of the peak rate that the card's data sheet gives.
        planned_bubble, bubble: idle share of the ranks' time: of the plan before the run, by
            estimated costs; and as recorded.
        messages_ms: waited in a step for messages whose content was there, a rank's mean.
        comm_ms, comm_exposed_ms: of a step, a rank's mean: collectives, and those of them beside
            which no other kernel ran.
        peak_gib, estimate_gib: memory of the rank that needs most, if it is a GPU's, and what was
            predicted.
        losses: of all steps, with spaces between them.
        note: what else there is to say.
    """

    op: str
    case: str
    status: str = MEASURED
    ranks: int | None = None
    pp: int | None = None
    micro_batches: int | None = None
    recompute: str = ""
    step_ms: float | None = None
    spread: float | None = None
    predicted_ms: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    planned_bubble: float | None = None
    bubble: float | None = None
    messages_ms: float | None = None
    comm_ms: float | None = None
    comm_exposed_ms: float | None = None
    peak_gib: float | None = None
    estimate_gib: float | None = None
    losses: str = ""
    note: str = ""

    def by_step(self) -> list[float]:
        """The losses."""
        return [float(each) for each in self.losses.split()]


HEAD = (
    f"{'layout':<30s} {'tok/s/GPU':>9s} {'MFU':>6s} {'step ms':>9s} {'spread':>6s} {'/ sim':>6s}"
    f" {'plan':>6s} {'bubble':>6s} {'msgs ms':>8s} {'comm ms':>8s} {'exposed':>8s} {'GiB':>6s}"
    f" {'est.':>6s}  recompute"
)
LEGEND = (
    "/ sim: measured step over the one simulated with the run's own stage times; plan, bubble: "
    "idle share of all ranks' time,\nplanned and recorded; msgs ms: waits for pipeline messages "
    "that were on their way; comm ms: collectives, exposed: with nothing beside them"
)


def ratio(measured: float | None, predicted: float | None) -> float | None:
    """None if one of them is."""
    return None if measured is None or not predicted else measured / predicted


def show(row: Row) -> str:
    """A printed line."""
    if row.status == FAILED:
        return f"{row.case:<30s} failed: {row.note}"
    if row.op == LOSSES:
        steps = row.by_step()
        told = f"loss {steps[0]:.4f} -> {steps[-1]:.4f} in {len(steps)} steps"
        return f"{row.case:<30s} {told}  {row.note}".rstrip()
    cells = [
        cell(row.tokens_per_s, 9, 0),
        share(row.mfu),
        cell(row.step_ms, 9, 1),
        share(row.spread),
        cell(ratio(row.step_ms, row.predicted_ms), 6, 3),
        share(row.planned_bubble),
        share(row.bubble),
        cell(row.messages_ms, 8, 1),
        cell(row.comm_ms, 8, 1),
        cell(row.comm_exposed_ms, 8, 1),
        cell(row.peak_gib, 6, 1),
        cell(row.estimate_gib, 6, 1),
    ]
    return f"{row.case:<30s} {' '.join(cells)}  {row.recompute}"
