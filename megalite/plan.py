"""What a pipeline schedule takes: time, bubble, memory, messages; all of them side by side.

python -m megalite.plan --schedule zb-v --pp 4 --micro-batches 8
python -m megalite.plan --pp 4 --micro-batches 8 --compare
python -m megalite.plan --pp 8 --micro-batches 32 --costs input=1.2,weight=0.7 --compare
python -m megalite.plan --schedule mine.txt

Times are those of one micro-batch on all stages of a rank, in a unit of your own. A schedule is
drawn by tools/draw_schedule.py; docs/schedules.md says when to use which.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megalite.errors import ConfigError
from megalite.field_values import suggest
from megalite.pipeline.actions import SENDS, Plan, PlanError
from megalite.pipeline.check import check_plan, check_program
from megalite.pipeline.lower import lower
from megalite.pipeline.schedules import SCHEDULES, make_plan
from megalite.pipeline.simulate import simulate
from megalite.pipeline.times import TIMES_HELP, TIMES_TEXT, costs_of, read_times
from megalite.preprocessing.flags import Flag, Values, end, read_flags, together
from megalite.run_plan import is_file, read_plan

MOST_FORWARDS = 100_000
"""Of the schedules that are compared, together; they take a minute or so."""

FLAGS = (
    Flag("--schedule", f"{', '.join(SCHEDULES)}, or a file of actions.", "1f1b",
         metavar="NAME|FILE"),
    Flag("--pp", "Pipeline ranks.", 4, metavar="RANKS"),
    Flag("--micro-batches", "Of a step, on each data rank.", 8, metavar="COUNT"),
    Flag("--chunks", "Stages of each rank, of schedules that take any number. 0: their own.", 0,
         metavar="STAGES"),
    Flag("--costs", TIMES_HELP, TIMES_TEXT, metavar="NAME=TIME,..."),
    Flag("--compare", "Every schedule in place of one.", False),
)  # fmt: skip


@dataclass(frozen=True)
class Figures:
    """What a plan takes, simulated.

    Attributes:
        name: of the schedule.
        chunks: stages of each rank.
        makespan: of a step, in the unit of the times.
        bubble: idle share of all ranks' time.
        span_bubble: idle share of the idlest rank, from its own first action to its last.
        peak: the most micro-batches whose activations a rank keeps, in those of a whole rank.
        messages: that the busiest rank sends.
    """

    name: str
    chunks: float
    makespan: float
    bubble: float
    span_bubble: float
    peak: float
    messages: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    Raises:
        ConfigError: all that is wrong with the flags.
    """
    words = sys.argv[1:] if argv is None else argv
    values, problems = read_flags(
        words, FLAGS, prog="python -m megalite.plan", description=__doc__ or ""
    )
    problems += _size_problems(values)
    times = together(problems, lambda: read_times(values["costs"]))
    names = list(SCHEDULES) if values["compare"] else [values["schedule"]]
    plans = [_plan(name, values, times) for name in names]
    print(table([figures(plan, times) for plan in plans]))
    return 0


def planned(
    name: str, num_ranks: int, num_micro_batches: int, times: Mapping[str, float], chunks: int = 0
) -> Plan:
    """The plan of a schedule whose ranks take the times for a micro-batch.

    Args:
        chunks: of schedules that take any number; 0: their own.
    """
    own, most = SCHEDULES[name].chunks
    number = chunks if chunks and not most else own
    stages = len(SCHEDULES[name].place(num_ranks, number))
    costs = costs_of(num_ranks, stages, times)
    return make_plan(name, num_ranks, num_micro_batches, chunks=number, costs=costs)


def figures(plan: Plan, times: Mapping[str, float]) -> Figures:
    """A plan's figures."""
    costs = costs_of(plan.num_ranks, plan.num_stages, times)
    program = lower(plan, costs)
    step = simulate(program, costs)
    chunks = plan.num_stages / plan.num_ranks
    return Figures(
        plan.name,
        chunks,
        step.makespan,
        step.bubble(),
        step.bubble_of_spans(),
        max(map(costs.peak, plan.ranks)) / chunks,
        max(sum(step.op in SENDS for step in steps) for steps in program.ranks),
    )


def table(rows: Sequence[Figures]) -> str:
    """The figures of plans below each other, with what they mean."""
    width = max(len("schedule"), *(len(row.name) for row in rows))
    lines = [
        f"{'schedule':<{width}}  chunks  makespan  bubble  in spans  peak activations  messages"
    ]
    lines += [
        f"{row.name:<{width}}  {row.chunks:6g}  {row.makespan:8.5g}  {row.bubble:6.1%}  "
        f"{row.span_bubble:8.1%}  {row.peak:16.4g}  {row.messages:8d}"
        for row in rows
    ]
    return "\n".join(
        [
            *lines,
            "",
            "bubble: idle share of all ranks' time; in spans: of the idlest rank's, from its first "
            "action to its last.",
            "peak activations: the most micro-batches that a rank keeps, all its stages together; "
            "messages: sent by the busiest rank.",
        ]
    )


def _size_problems(values: Values) -> list[str]:
    """What is wrong with the schedule's name and sizes."""
    name, chunks = values["schedule"], values["chunks"]
    problems = []
    if values["compare"]:
        problems += values.no_effect("schedule", "with --compare, which shows them all")
    elif is_file(name):
        if not Path(name).is_file():
            nearest = suggest(name.lower(), SCHEDULES, every=True)
            return [f"--schedule {name}: there is no such schedule or file{nearest}"]
        why = "with a file of actions, which names its own"
        flags = ("pp", "micro_batches", "chunks")
        return [problem for flag in flags for problem in values.no_effect(flag, why)]
    elif chunks > 0 and SCHEDULES[name].chunks[1] not in (0, chunks):
        problems.append(f"--chunks {chunks}: {name} has {SCHEDULES[name].chunks[1]} on each rank")
    problems += [
        f"{flag} {number} must be above 0"
        for flag, number in (("--pp", values["pp"]), ("--micro-batches", values["micro_batches"]))
        if number < 1
    ]
    if chunks < 0:
        problems.append(f"--chunks {chunks} must be above 0, or 0 for the schedule's own number")
    count = values["pp"] * values["micro_batches"] * max(1, chunks)
    if not problems and count > MOST_FORWARDS:
        problems.append(
            f"--pp {values['pp']} with --micro-batches {values['micro_batches']}: {count:,} "
            f"forwards are too many to simulate, the most is {MOST_FORWARDS:,}"
        )
    return problems


def _plan(name: str, values: Values, times: Mapping[str, float]) -> Plan:
    """The plan, checked if it is someone's own.

    Raises:
        ConfigError: a file that holds none.
    """
    if not is_file(name):
        return planned(name, values["pp"], values["micro_batches"], times, values["chunks"])
    try:
        plan = read_plan(name)
        check_plan(plan)
        check_program(lower(plan))
    except PlanError as error:
        told = str(error).removeprefix(f"plan {name}").lstrip(": ")
        raise ConfigError(f"--schedule {name}: {told}") from None
    return plan


def cli_main() -> NoReturn:
    """Entry point of the console script."""
    end(main)


if __name__ == "__main__":
    cli_main()
