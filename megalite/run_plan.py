"""Which plan a run follows: from its configuration to stages, ranks and actions. No torch import."""

from __future__ import annotations

from pathlib import Path

from megalite.config import Config
from megalite.pipeline.actions import Plan
from megalite.pipeline.schedules import SCHEDULES, make_plan
from megalite.pipeline.text import parse_plan


def is_file(schedule: str) -> bool:
    """Whether `--schedule` names a file of actions rather than a schedule."""
    return schedule not in SCHEDULES


def stage_rank(config: Config) -> tuple[int, ...]:
    """Pipeline rank of each stage of the run."""
    schedule, parallel = config.parallel.schedule, config.parallel
    if is_file(schedule):
        return read_plan(schedule).stage_rank
    known = SCHEDULES[schedule]
    return known.place(parallel.pp, parallel.chunks or known.chunks[0])


def run_plan(config: Config, num_micro_batches: int | None = None) -> Plan:
    """The plan of a step.

    Args:
        config: resolved.
        num_micro_batches: of the step on each data rank; None: of a step of the full batch.
    """
    parallel = config.parallel
    if is_file(parallel.schedule):
        return read_plan(parallel.schedule)
    count = num_micro_batches or config.num_micro_batches
    return make_plan(parallel.schedule, parallel.pp, count, chunks=parallel.chunks)


def read_plan(path: str) -> Plan:
    """The plan in a file.

    Raises:
        PlanError, OSError, UnicodeDecodeError: it holds none.
    """
    return parse_plan(Path(path).read_text(encoding="utf-8"), path)
