"""What a pipeline schedule takes: time, bubble, memory, messages; all of them side by side.

python -m megalite.plan --schedule zb-v --pp 4 --micro-batches 8
python -m megalite.plan --pp 4 --micro-batches 8 --compare
python -m megalite.plan --pp 8 --micro-batches 32 --costs input=1.2,weight=0.7 --compare
python -m megalite.plan --schedule mine.txt
python -m megalite.plan --memory --model llama3-8b --tp 4 --dp 8

Times are those of one micro-batch on all stages of a rank, in a unit of your own. A schedule is
drawn by tools/draw_schedule.py; docs/schedules.md says when to use which. With --memory all other
flags are those of megalite.pretrain: what a rank of that run needs, under each ZeRO level.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from megalite import cli, report
from megalite.pipeline.actions import SENDS, Plan
from megalite.pipeline.lower import lower
from megalite.pipeline.schedules import SCHEDULES
from megalite.pipeline.simulate import simulate
from megalite.pipeline.times import costs_of, read_times
from megalite.planning.choice import choose_by_estimate, has_choice, without_choice
from megalite.preprocessing.flags import Flag, end, read_flags, together
from megalite.program import checked
from megalite.schedule_flags import (
    SCHEDULE_FLAGS,
    plan_of,
    planned,
    schedule_problems,
    size_problems,
    takes,
)

MOST_FORWARDS = 100_000
"""Of the schedules that are compared, together; they take a minute or so."""

MEMORY = "--memory"
FLAGS = (
    *SCHEDULE_FLAGS,
    Flag("--compare", "Every schedule in place of one.", False),
    Flag(MEMORY, "Memory of a run, in place of a schedule: its flags follow.", False),
)


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
    if MEMORY in words:
        print(memory([word for word in words if word != MEMORY]))
        return 0
    values, problems = read_flags(
        words, FLAGS, prog="python -m megalite.plan", description=__doc__ or ""
    )
    if values["compare"]:
        problems += values.no_effect("schedule", "with --compare, which shows them all")
        problems += size_problems(values, MOST_FORWARDS, "simulate")
    else:
        problems += schedule_problems(values, MOST_FORWARDS, "simulate")
    times = together(problems, lambda: read_times(values["costs"]))
    if values["compare"]:
        sizes = (values["pp"], values["micro_batches"], times, values["chunks"])
        plans = [planned(name, *sizes) for name in SCHEDULES]
    else:
        plans = [plan_of(values, times)]
    print(table([figures(plan, times) for plan in plans]))
    if values["compare"]:
        print(_without_chunks(values["chunks"]), end="")
    return 0


def memory(words: Sequence[str]) -> str:
    """What the ranks of a run need, and what they would under each ZeRO level.

    Raises:
        ConfigError: all that is wrong with the run's flags.
    """
    name = f"python -m megalite.plan {MEMORY}"
    command = cli.parse(words, prog=name, description="Memory of a run.", switches={})
    config = without_choice(checked(command, None))
    if has_choice(config):
        config = choose_by_estimate(config).config
    return "\n\n".join(filter(None, (report.rank_table(config), report.levels(config))))


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


def _without_chunks(chunks: int) -> str:
    """Which schedules keep their own number of stages, if one was given."""
    own = [name for name in SCHEDULES if chunks and not takes(name, chunks)]
    if not own:
        return ""
    return f"--chunks {chunks} has no effect on {', '.join(own)}, which have their own number.\n"


def cli_main() -> NoReturn:
    """Entry point of the console script."""
    end(main)


if __name__ == "__main__":
    cli_main()
