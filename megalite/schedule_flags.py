"""Flags of programs that show a schedule: which one, how large, at what costs. No torch import."""

from __future__ import annotations

from collections.abc import Mapping

from megalite.check_pipeline import missing_file, wrong_chunks
from megalite.errors import ConfigError
from megalite.pipeline.actions import Plan, PlanError
from megalite.pipeline.schedules import SCHEDULES, make_plan
from megalite.pipeline.times import TIMES_HELP, TIMES_TEXT, costs_of
from megalite.preprocessing.flags import Flag, Values
from megalite.run_plan import AUTO, checked_plan, is_file

SCHEDULE_FLAGS = (
    Flag("--schedule", f"{', '.join(SCHEDULES)}, or a file of actions, as draw_schedule.py "
         "--format actions prints it.", "1f1b", metavar="NAME|FILE"),
    Flag("--pp", "Pipeline ranks.", 4, metavar="RANKS"),
    Flag("--micro-batches", "Of a step, on each data rank.", 8, metavar="COUNT"),
    Flag("--chunks", "Stages of each rank, of schedules that take any number. 0: their own.", 0,
         metavar="STAGES"),
    Flag("--costs", TIMES_HELP, TIMES_TEXT, metavar="NAME=TIME,..."),
)  # fmt: skip


def schedule_problems(values: Values, most: int, purpose: str) -> list[str]:
    """What is wrong with the schedule's name and sizes.

    Args:
        values: of `SCHEDULE_FLAGS`.
        most, purpose: see `size_problems`.
    """
    name, chunks = values["schedule"], values["chunks"]
    if is_file(name):
        why = "with a file of actions, which names its own"
        missing = list(missing_file(name, SCHEDULES))
        if missing:
            return missing + size_problems(values, most, purpose)
        return [
            problem
            for flag in ("pp", "micro_batches", "chunks")
            for problem in values.no_effect(flag, why)
        ]
    problems = []
    if name == AUTO:
        problems.append(
            "--schedule auto is chosen for a run, by its model's costs; name one of "
            f"{', '.join(SCHEDULES)}, or compare them all by python -m megalite.plan --compare"
        )
    elif chunks > 0:
        problems += wrong_chunks(name, chunks)
    return problems + size_problems(values, most, purpose)


def size_problems(values: Values, most: int, purpose: str) -> list[str]:
    """What is wrong with the sizes of a schedule by name.

    Args:
        values: of `SCHEDULE_FLAGS`.
        most: forwards that there may be.
        purpose: what more are too many for: `draw`.
    """
    ranks, micro_batches, chunks = (values[name] for name in ("pp", "micro_batches", "chunks"))
    problems = [
        f"{flag} {number} must be above 0"
        for flag, number in (("--pp", ranks), ("--micro-batches", micro_batches))
        if number < 1
    ]
    if chunks < 0:
        problems.append(f"--chunks {chunks} must be above 0, or 0 for the schedule's own number")
    count = ranks * micro_batches * max(1, chunks)
    if not problems and count > most:
        problems.append(
            f"--pp {ranks} with --micro-batches {micro_batches}: {count:,} forwards are too many "
            f"to {purpose}, the most is {most:,}"
        )
    return problems


def plan_of(values: Values, times: Mapping[str, float]) -> Plan:
    """The plan that the flags name; one in a file is checked.

    Raises:
        ConfigError: a file that holds none; ranks, actions and lines are named.
    """
    name = values["schedule"]
    if not is_file(name):
        return planned(name, values["pp"], values["micro_batches"], times, values["chunks"])
    try:
        return checked_plan(name)
    except PlanError as error:
        raise ConfigError(str(error)) from None


def planned(
    name: str, num_ranks: int, num_micro_batches: int, times: Mapping[str, float], chunks: int = 0
) -> Plan:
    """The plan of a schedule whose ranks take the times for a micro-batch.

    Args:
        chunks: of schedules that can have so many; 0: their own.
    """
    number = chunks if chunks and takes(name, chunks) else SCHEDULES[name].chunks[0]
    stages = len(SCHEDULES[name].place(num_ranks, number))
    costs = costs_of(num_ranks, stages, times)
    return make_plan(name, num_ranks, num_micro_batches, chunks=number, costs=costs)


def takes(name: str, chunks: int) -> bool:
    """Whether a schedule can have so many stages on a rank."""
    return not any(wrong_chunks(name, chunks))
