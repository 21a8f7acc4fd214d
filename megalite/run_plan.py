"""Which plan a run follows: from its configuration to stages, ranks, actions. No torch import."""

from __future__ import annotations

from pathlib import Path

from megalite.config import Config
from megalite.pipeline.actions import Plan, PlanError
from megalite.pipeline.costs import Costs
from megalite.pipeline.schedules import SCHEDULES, make_plan
from megalite.pipeline.text import parse_plan

AUTO = "auto"
"""The name of `--schedule` that asks for the fastest one."""


def is_file(schedule: str) -> bool:
    """Whether `--schedule` names a file of actions rather than a schedule."""
    return schedule not in SCHEDULES and schedule != AUTO


def num_stages(config: Config) -> int:
    """Stages of the model, over all pipeline ranks; the fewest, if the schedule is not chosen yet.

    Raises:
        PlanError: `--schedule` names a file that holds no plan.
    """
    parallel = config.parallel
    if is_file(parallel.schedule):
        return read_plan(parallel.schedule).num_stages
    return parallel.pp * (parallel.chunks or least_chunks(parallel.schedule))


def least_chunks(schedule: str) -> int:
    """The fewest stages that a rank can have."""
    return 1 if schedule == AUTO else SCHEDULES[schedule].chunks[0]


def stage_rank(config: Config) -> tuple[int, ...]:
    """Pipeline rank of each stage of the run."""
    schedule, parallel = config.parallel.schedule, config.parallel
    if is_file(schedule):
        return read_plan(schedule).stage_rank
    known = SCHEDULES[schedule]
    return known.place(parallel.pp, parallel.chunks or known.chunks[0])


def run_plan(
    config: Config,
    num_micro_batches: int | None = None,
    costs: Costs | None = None,
    limit: float | None = None,
) -> Plan:
    """The plan of a step.

    Args:
        config: resolved, its schedule chosen.
        num_micro_batches: of the step on each data rank; None: of a step of the full batch.
        costs, limit: see `make_plan`; a plan in a file stays as it is.
    """
    parallel = config.parallel
    if is_file(parallel.schedule):
        return read_plan(parallel.schedule)
    count = num_micro_batches or config.num_micro_batches
    return make_plan(
        parallel.schedule,
        parallel.pp,
        count,
        chunks=parallel.chunks,
        costs=costs,
        limit=limit,
    )


def read_plan(path: str) -> Plan:
    """The plan in a file.

    Raises:
        PlanError: it cannot be read, or holds none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", error)
        raise PlanError(f"plan {path} cannot be read: {why}") from None
    return parse_plan(text, path)
