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
from collections.abc import Sequence
from pathlib import Path

from megalite.errors import ConfigError
from megalite.pipeline.draw import draw_folded, legend
from megalite.pipeline.draw_svg import draw_svg
from megalite.pipeline.idle import comparison, idle_table, parts_table
from megalite.pipeline.perfetto import perfetto_trace
from megalite.pipeline.picture import Picture, measured, planned
from megalite.pipeline.text import plan_text
from megalite.pipeline.times import costs_of, read_times
from megalite.pipeline.trace import Trace
from megalite.pipeline.trace_file import read_trace
from megalite.preprocessing.flags import Flag, Values, end, read_flags, together
from megalite.schedule_flags import SCHEDULE_FLAGS, plan_of, schedule_problems
from megalite.wording import counted

MOST_ACTIONS = 200_000
"""Of a plan to draw, in forwards."""

FLAGS = (
    *SCHEDULE_FLAGS,
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
    problems += schedule_problems(values, MOST_ACTIONS, "draw")
    times = together(problems, lambda: read_times(values["costs"]))
    plan = plan_of(values, times)
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
