"""Losses of all layouts and of one rank: `python -m megalite.pretrain`, once for each. No torch
import."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType

from loss_noise import FailedRunError, Yardstick, training_run
from row_table import FAILED, RowTable, measured
from settings import on_gpu

from eight_gpus.rows import LOSSES, Row

FORWARD = ("one rank", "one rank, again")
BACKWARD = ("one rank, reversed", "one rank, again, reversed")
TRUTH = ("one rank, fp32",)
MORE: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(FORWARD, ""),
        **dict.fromkeys(BACKWARD, "--reverse-micro-batches"),
        **dict.fromkeys(TRUTH, "--precision fp32"),
    }
)
"""Flags of the one-rank cases, in order; fp32 takes longest."""


def measure_one_rank(
    table: RowTable[Row], flags: Mapping[str, str], notes: Mapping[str, str], side_by_side: int
) -> bool:
    """Rows of one-rank cases; whether all went well.

    Args:
        table: to add them to.
        flags: by case.
        notes: by case, for the rows.
        side_by_side: so many at once, each on a GPU of its own; 0: one after the other.
    """
    left, good = list(flags), True
    while left:
        together, left = left[: side_by_side or 1], left[side_by_side or 1 :]
        with ExitStack() as held:
            runs = {
                case: held.enter_context(
                    training_run(flags[case].split(), [on_gpu(i) if side_by_side else {}])
                )
                for i, case in enumerate(together)
            }
            for case, losses in runs.items():
                good &= add(table, case, losses, notes[case])
    return good


def measure_layout(
    table: RowTable[Row], case: str, flags: str, ranks: Sequence[Mapping[str, str]]
) -> bool:
    """The row of a layout; whether it went well.

    Args:
        table: to add it to.
        case: the layout's flags.
        flags: of the run.
        ranks: environments of the processes to start.
    """
    with training_run(flags.split(), ranks) as losses:
        return add(table, case, losses)


def add(table: RowTable[Row], case: str, losses: Callable[[], list[float]], note: str = "") -> bool:
    """Wait for a run and add its row; whether it went well."""
    try:
        row = Row(LOSSES, case, losses=" ".join(map(repr, losses())), note=note)
    except FailedRunError as error:
        print(error, file=sys.stderr, flush=True)
        row = Row(LOSSES, case, status=FAILED, note=str(error).strip().splitlines()[-1])
    table.add(row)
    return row.status != FAILED


def judge(rows: Sequence[Row]) -> Iterator[tuple[str, str, bool]]:
    """Of each layout with losses: its flags, a verdict in words, whether it agrees."""
    found = measured(rows, LOSSES)
    forward, backward, exact = (
        [found[case].by_step() for case in cases if case in found]
        for cases in (FORWARD, BACKWARD, TRUTH)
    )
    if not forward or not backward:
        return
    yardstick = Yardstick(forward, backward, exact)
    for case, row in found.items():
        if case not in MORE:
            verdict = yardstick.judge(row.by_step())
            yield case, verdict.text, verdict.is_noise
