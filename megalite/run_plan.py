"""Which plan a run follows: from its configuration to stages, ranks, actions. No torch import."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from megalite.config import Config
from megalite.pipeline.actions import Plan, PlanError
from megalite.pipeline.check import check_plan, check_program
from megalite.pipeline.costs import Costs
from megalite.pipeline.lower import lower
from megalite.pipeline.schedules import SCHEDULES, make_plan
from megalite.pipeline.text import parse_plan, plan_text, rank_lines

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
    assert schedule != AUTO, "a schedule has to be chosen first"
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
    assert parallel.schedule != AUTO, "a schedule has to be chosen first"
    count = num_micro_batches or config.num_micro_batches
    return make_plan(
        parallel.schedule,
        parallel.pp,
        count,
        chunks=parallel.chunks,
        costs=costs,
        limit=limit,
    )


def plan_facts(config: Config) -> dict[str, str]:
    """What ranks have to agree on beside `--schedule`: a fingerprint of the plan in its file."""
    schedule = config.parallel.schedule
    if not is_file(schedule):
        return {}
    text = plan_text(read_plan(schedule))
    return {f"the plan in {schedule}": hashlib.sha256(text.encode()).hexdigest()[:16]}


def read_plan(path: str) -> Plan:
    """The plan in the file of `--schedule`, not checked yet.

    Raises:
        PlanError: naming the flag: it cannot be read, or holds none.
    """
    return _parsed(_text(path), path)


def checked_plan(path: str) -> Plan:
    """The plan in the file of `--schedule`, whole and without a deadlock.

    Raises:
        PlanError: naming the flag, and beside each rank its line in the file.
    """
    text = _text(path)
    plan = _parsed(text, path)
    try:
        check_plan(plan)
        check_program(lower(plan))
    except PlanError as error:
        lines = rank_lines(text)
        told = re.sub(
            r"\brank (\d+)",
            lambda rank: f"{rank[0]} (line {lines[int(rank[1])]})",
            _without_name(error, path),
        )
        raise PlanError(f"--schedule {path}: {told}") from None
    return plan


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", error)
        raise PlanError(f"--schedule {path}: cannot be read: {why}") from None


def _parsed(text: str, path: str) -> Plan:
    try:
        return parse_plan(text, path)
    except PlanError as error:
        raise PlanError(f"--schedule {path}: {_without_name(error, path)}") from None


def _without_name(error: PlanError, name: str) -> str:
    """What is wrong, without the name of the plan in front."""
    return str(error).removeprefix(f"plan {name}").lstrip(": ")
