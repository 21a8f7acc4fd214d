"""What the figures should be, and which of them are. No torch import."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from row_table import measured
from schedule_bench.goals import Verdict

from eight_gpus import agreement
from eight_gpus.layouts import FLAGSHIP
from eight_gpus.rows import SPEED, Row, ratio

FLAGSHIP_MFU, BEST_MFU, OFF = 0.45, 0.52, 0.10


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """The goals for which there are figures."""
    return [*_speed(rows), *_losses(rows)]


def _speed(rows: Sequence[Row]) -> Iterator[Verdict]:
    found = measured(rows, SPEED)
    mfus = {case: row.mfu for case, row in found.items() if row.mfu is not None}
    if FLAGSHIP in mfus:
        mfu = mfus[FLAGSHIP]
        yield Verdict(f"{FLAGSHIP}: MFU >= {FLAGSHIP_MFU:.0%}", f"{mfu:.1%}", mfu >= FLAGSHIP_MFU)
    if mfus:
        best = max(mfus, key=mfus.__getitem__)
        told = f"{mfus[best]:.1%} ({best})"
        yield Verdict(f"best layout: MFU >= {BEST_MFU:.0%}", told, mfus[best] >= BEST_MFU)
    for case, row in found.items():
        time = ratio(row.step_ms, row.predicted_ms)
        if time is not None and row.pp != 1:  # of one stage the simulator has nothing to say
            goal = f"{case}: step within {OFF:.0%} of the simulator's"
            yield Verdict(goal, f"{time:.3f} of it", abs(time - 1) <= OFF)
        memory = ratio(row.peak_gib, row.estimate_gib)
        if memory is not None:
            goal = f"{case}: memory within {OFF:.0%} of the prediction"
            yield Verdict(goal, f"{memory:.3f} of it", abs(memory - 1) <= OFF)
    failed = {row.case: row for row in rows if row.op == SPEED and row.case not in found}
    for case, row in failed.items():
        yield Verdict(f"{case}: trains", row.note, False)


def _losses(rows: Sequence[Row]) -> Iterator[Verdict]:
    for case, told, agrees in agreement.judge(rows):
        yield Verdict(f"{case}: losses are one rank's", told, agrees)
