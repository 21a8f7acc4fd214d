"""Losses of all layouts and of one rank: `python -m megalite.pretrain`, once for each. No torch
import."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack

from loss_noise import FailedRunError, TrainingRun, Yardstick
from row_table import RowTable

from eight_gpus.rows import FAILED, LOSSES, Row, measured

FORWARD = tuple(f"one rank{again}" for again in ("", ", again"))
BACKWARD = tuple(f"{case}, reversed" for case in FORWARD)
REVERSED = "--reverse-micro-batches"
TRUTH = ("one rank, fp32",)
ONE_RANK = (FORWARD, BACKWARD, TRUTH)
"""Those of a group are run side by side, if there are GPUs enough."""


def measure_one_rank(
    table: RowTable[Row], cases: Iterable[str], flags: str, *, note: str, side_by_side: bool
) -> bool:
    """Rows of one-rank cases; whether all went well.

    Args:
        table: to add them to.
        cases: of one group.
        flags: of all runs.
        note: on the rows.
        side_by_side: each case has a GPU of its own, and all run at once.
    """
    cases, good = list(cases), True
    for together in [cases] if side_by_side else [[case] for case in cases]:
        with ExitStack() as held:
            runs = {}
            for number, case in enumerate(together):
                place = {"CUDA_VISIBLE_DEVICES": str(number)} if side_by_side else {}
                words = f"{flags} {_more(case)}".split()
                runs[case] = held.enter_context(TrainingRun(words, [place]))
            for case, run in runs.items():
                good &= add(table, case, run, note)
    return good


def _more(case: str) -> str:
    """Flags of a one-rank case."""
    if case in TRUTH:
        return "--precision fp32"
    return REVERSED if case in BACKWARD else ""


def measure_layout(
    table: RowTable[Row], case: str, flags: str, ranks: Sequence[Mapping[str, str]]
) -> bool:
    """The row of a layout; whether it went well.

    Args:
        table: to add it to.
        case: the layout's flags.
        flags: of all runs.
        ranks: environments of the processes to start.
    """
    with TrainingRun(f"{flags} {case}".split(), ranks) as run:
        return add(table, case, run)


def add(table: RowTable[Row], case: str, run: TrainingRun, note: str = "") -> bool:
    """Wait for a run and add its row; whether it went well."""
    try:
        row = Row(LOSSES, case, losses=" ".join(map(repr, run.losses())), note=note)
    except FailedRunError as error:
        print(error, file=sys.stderr, flush=True)
        row = Row(LOSSES, case, status=FAILED, note=str(error).strip().splitlines()[-1])
    table.add(row)
    return row.status != FAILED


def judge(rows: Sequence[Row]) -> Iterator[tuple[str, str, bool]]:
    """Of each layout with losses: its flags, a verdict in words, whether it agrees."""
    found = measured(rows, LOSSES)
    forward = [found[case].by_step() for case in FORWARD if case in found]
    backward = [found[case].by_step() for case in BACKWARD if case in found]
    rounded = [found[case].by_step() for case in TRUTH if case in found]
    if not forward or not backward:
        return
    yardstick = Yardstick(forward, backward, rounded)
    for case, row in found.items():
        if case not in FORWARD + BACKWARD + TRUTH:
            verdict = yardstick.judge(row.by_step())
            yield case, verdict.text, verdict.is_noise
