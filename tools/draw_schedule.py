"""Draw a pipeline schedule, or what a run's pipeline did, with bubble and memory.

python tools/draw_schedule.py --schedule 1f1b --pp 4 --micro-batches 8
python tools/draw_schedule.py --schedule zb-v --format svg --output zb-v.svg
python tools/draw_schedule.py --schedule zb-h1 --costs forward=1,input=1.1,weight=0.7,message=0.1

A schedule of one's own: print one, change it, look at it, train with it.

python tools/draw_schedule.py --schedule 1f1b --format actions --output mine.txt
python tools/draw_schedule.py --schedule mine.txt
python -m megalite.pretrain --pp 4 --global-batch-size 32 --schedule mine.txt

A run beside its plan, with where each rank's idle time went; --format perfetto for
ui.perfetto.dev:

python -m megalite.pretrain --pp 2 --global-batch-size 32 --trace-steps 5 --name mine
python tools/draw_schedule.py --trace runs/mine

Exit code 2 if anything is wrong.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megalite.errors import ConfigError
from megalite.field_values import suggest
from megalite.pipeline.actions import Plan, PlanError
from megalite.pipeline.check import check_plan, check_program
from megalite.pipeline.draw import draw_folded, legend
from megalite.pipeline.draw_svg import draw_svg
from megalite.pipeline.idle import comparison, idle_table, parts_table
from megalite.pipeline.lower import lower
from megalite.pipeline.perfetto import perfetto_trace
from megalite.pipeline.picture import Picture, measured, planned
from megalite.pipeline.schedules import SCHEDULES, make_plan
from megalite.pipeline.text import plan_text
from megalite.pipeline.times import TIMES_HELP, TIMES_TEXT, costs_of, read_times
from megalite.pipeline.trace import Trace
from megalite.pipeline.trace_file import read_trace
from megalite.preprocessing.flags import Flag, Values, end, read_flags, together
from megalite.run_plan import is_file, read_plan
from megalite.wording import counted

MOST_ACTIONS = 200_000
"""Of a plan to draw, in forwards."""

FLAGS = (
    Flag(
        "--schedule",
        f"{', '.join(SCHEDULES)}, or a file of actions as --format actions prints it.",
        "1f1b",
        metavar="NAME|FILE",
    ),
    Flag("--pp", "Pipeline ranks.", 4, metavar="RANKS"),
    Flag("--micro-batches", "Of a step, on each data rank.", 8, metavar="COUNT"),
    Flag("--chunks", "Stages of each rank. 0: the schedule's own number.", 0, metavar="STAGES"),
    Flag("--costs", TIMES_HELP, TIMES_TEXT, metavar="NAME=TIME,..."),
    Flag(
        "--trace",
        "Draw what a run of megalite.pretrain --trace-steps did, beside its plan.",
        metavar="RUN_FOLDER",
    ),
    Flag("--step", "Of the trace. Default: the one of median length.", None),
    Flag(
        "--format",
        "text: for the terminal; svg: for a browser; perfetto: for ui.perfetto.dev; actions: the "
        "plan's actions, as --schedule takes them.",
        "text",
        choices=("text", "svg", "perfetto", "actions"),
    ),
    Flag("--output", "Where to write; an older file is replaced. Default: standard output.",
         metavar="FILE"),
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Run the tool; returns its exit code."""
    values, problems = read_flags(argv, FLAGS, prog="draw_schedule.py", description=__doc__ or "")
    problems += _output_problems(values["output"])
    text = _of_run(values, problems) if values["trace"] else _of_plan(values, problems)
    if not values["output"]:
        print(text, end="")
        return 0
    try:
        Path(values["output"]).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {values['output']}: {error.strerror}") from None
    return 0


def _output_problems(name: str) -> list[str]:
    path = Path(name)
    if name and path.is_dir():
        return [f"--output {name} is a folder"]
    if name and not path.parent.is_dir():
        return [f"--output {name}: there is no folder {path.parent}"]
    return []


def _of_plan(values: Values, problems: list[str]) -> str:
    """A plan in the format that was asked for."""
    problems += values.no_effect("step", "without --trace")
    problems += _size_problems(values)
    times = together(problems, lambda: read_times(values["costs"]))
    plan = _plan(values, times)
    if values["format"] == "actions":
        return plan_text(plan)
    picture = planned(plan, costs_of(plan.num_ranks, plan.num_stages, times))
    if values["format"] != "text":
        return _drawn(values["format"], [picture])
    heading = f"{plan.name}, {counted(plan.num_ranks, 'rank')}, "
    heading += counted(plan.num_micro_batches, "micro-batch")
    return "\n".join(
        [f"{heading} ({legend(picture)})", _text(picture, picture.unit, values["output"]), "",
         *picture.figures(), ""]
    )  # fmt: skip


def _size_problems(values: Values) -> list[str]:
    """What is wrong with the schedule's name and sizes."""
    name, chunks = values["schedule"], values["chunks"]
    if is_file(name):
        if not Path(name).exists():
            nearest = suggest(name.lower(), SCHEDULES, every=True)
            return [f"--schedule {name}: there is no such schedule or file{nearest}"]
        why = "with a file of actions, which names its own"
        return [
            problem
            for flag in ("pp", "micro_batches", "chunks")
            for problem in values.no_effect(flag, why)
        ]
    problems = [
        f"{flag} {number} must be above 0"
        for flag, number in (("--pp", values["pp"]), ("--micro-batches", values["micro_batches"]))
        if number < 1
    ]
    most = SCHEDULES[name].chunks[1]
    if chunks < 0:
        problems.append(f"--chunks {chunks} must be above 0, or 0 for the schedule's own number")
    elif most and chunks > 0 and chunks != most:
        problems.append(f"--chunks {chunks}: {name} has {most} on each rank")
    count = values["pp"] * values["micro_batches"] * max(1, chunks)
    if not problems and count > MOST_ACTIONS:
        problems.append(
            f"--pp {values['pp']} with --micro-batches {values['micro_batches']}: {count} forwards "
            f"are too many to draw, the most is {MOST_ACTIONS}"
        )
    return problems


def _plan(values: Values, times: Mapping[str, float]) -> Plan:
    """The plan, checked.

    Raises:
        ConfigError: a file that holds none; ranks, actions and lines are named.
    """
    name = values["schedule"]
    if not is_file(name):
        chunks = values["chunks"]
        stages = len(SCHEDULES[name].place(values["pp"], chunks or SCHEDULES[name].chunks[0]))
        costs = costs_of(values["pp"], stages, times)
        return make_plan(name, values["pp"], values["micro_batches"], chunks=chunks, costs=costs)
    try:
        plan = read_plan(name)
    except PlanError as error:
        raise ConfigError(_about_file(name, error)) from None
    try:
        check_plan(plan)
        check_program(lower(plan))
    except PlanError as error:
        lines = ", ".join(map(str, _lines_of_ranks(name)))
        told = f"{_about_file(name, error)} (the ranks in order stand on lines {lines})"
        raise ConfigError(told) from None
    return plan


def _about_file(name: str, error: PlanError) -> str:
    return f"--schedule {name}: {str(error).removeprefix(f'plan {name}').lstrip(': ')}"


def _lines_of_ranks(path: str) -> list[int]:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [n for n, line in enumerate(lines, start=1) if line.split("#", 1)[0].strip()]


def _of_run(values: Values, problems: list[str]) -> str:
    """A run's step in the format that was asked for."""
    for name in ("schedule", "pp", "micro_batches", "chunks", "costs"):
        problems += values.no_effect(name, "with --trace, whose run had its own")
    trace = together(problems, lambda: read_trace(Path(values["trace"])))
    step = values["step"] if values["step"] is not None else trace.typical_step()
    if step not in trace.steps:
        listed = ", ".join(map(str, trace.steps))
        raise ConfigError(f"--step {step} is not in the trace; there are {listed}")
    if values["format"] == "actions":
        return plan_text(trace.plan)
    plan = planned(trace.plan, trace.costs(), "planned", in_seconds=True)
    run = measured(trace, step, "measured")
    if values["format"] != "text":
        return _drawn(values["format"], [plan, run])
    return _run_text(trace, step, plan, run, values["output"])


def _run_text(trace: Trace, step: int, plan: Picture, run: Picture, output: str) -> str:
    return "\n".join(
        [
            f"planned, by the measured times of {counted(trace.plan.num_stages, 'stage')} "
            f"({legend(plan)})",
            _text(plan, run.unit, output), "",
            f"measured, step {step}",
            _text(run, run.unit, output), "",
            *comparison(trace, step, plan, run), "",
            "where the time of the pipeline went:",
            idle_table([plan, run]), "",
            "the step's parts:",
            parts_table(trace, step), "",
        ]
    )  # fmt: skip


def _drawn(kind: str, pictures: Sequence[Picture]) -> str:
    return draw_svg(pictures) if kind == "svg" else perfetto_trace(pictures)


def _text(picture: Picture, unit: float, output: str) -> str:
    """As wide as the terminal; in colour if there is one and nobody forbids it."""
    on_terminal = not output and sys.stdout.isatty()
    coloured = on_terminal and "NO_COLOR" not in os.environ
    return draw_folded(
        picture, unit=unit, width=shutil.get_terminal_size((100, 24)).columns, coloured=coloured
    )  # fmt: skip


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as in `... | head`
    end(main)
