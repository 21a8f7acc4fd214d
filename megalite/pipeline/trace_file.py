"""The files of a trace: what each pipeline rank did in recorded steps of a run. No torch import.

`--trace-steps N` of `megalite.pretrain` writes into the run's folder

    trace/plan.txt           the plan of the steps, as text (see `megalite.pipeline.text`)
    trace/rank-00000.jsonl   what pipeline rank 0 did; of tensor and data rank 0

The first line of a rank's file names the rank; each other line is an action or a part of a step:

    {"rank": 0, "ranks": 2, "device": "cpu"}
    {"step": 3, "part": "pipeline", "start": 71.25, "end": 71.75}
    {"step": 3, "action": "0B1", "start": 71.5, "end": 71.625, "waited": 0.125, "waits_for": 1,
     "message": "0RECV_B1"}

Times are seconds on one clock, that of the first pipeline rank. An action that took another rank's
result waited for it, if only shortly, just before its start. The parts of a step follow each other
without a gap; see `megalite.pipeline.trace.PARTS`.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megalite.errors import DataError
from megalite.pipeline.actions import Action, Plan, PlanError
from megalite.pipeline.channels import received_for
from megalite.pipeline.check import check_plan
from megalite.pipeline.simulate import Span
from megalite.pipeline.text import parse_plan, plan_text
from megalite.pipeline.trace import PARTS, Part, RankStep, Trace

FOLDER, PLAN_FILE = "trace", "plan.txt"


def rank_file(folder: Path, rank: int) -> Path:
    """Where a pipeline rank's record is in a run's folder."""
    return folder / FOLDER / f"rank-{rank:05d}.jsonl"


def write_plan(folder: Path, plan: Plan) -> None:
    """Write the plan that a run's recorded steps follow."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    (folder / FOLDER / PLAN_FILE).write_text(plan_text(plan), encoding="utf-8")


def write_rank(folder: Path, plan: Plan, rank: int, device: str, steps: Sequence[RankStep]) -> None:
    """Write what a pipeline rank did; the file has its name once it is whole."""
    path = rank_file(folder, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = [{"rank": rank, "ranks": plan.num_ranks, "device": device}]
    for step in steps:
        lines += [
            {"step": step.step, "part": part.name, "start": part.start, "end": part.end}
            for part in step.parts
        ]
        lines += [_action_line(plan, step.step, span) for span in step.spans]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(temporary, path)


def _action_line(plan: Plan, step: int, span: Span) -> dict[str, Any]:
    line: dict[str, Any] = {"step": step, "action": str(span.action)}
    line |= {"start": span.start, "end": span.end}
    if span.waits_for >= 0:
        message = str(received_for(plan, span.action))
        line |= {"waited": round(span.waited, 9), "waits_for": span.waits_for, "message": message}
    return line


def read_trace(folder: Path) -> Trace:
    """The trace in a run's folder.

    Raises:
        DataError: there is none, or it is not whole; files, lines and actions are named.
    """
    path = folder / FOLDER / PLAN_FILE
    try:
        plan = parse_plan(path.read_text(encoding="utf-8"), str(path))
        check_plan(plan)
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise DataError(
            f"{path}: {why}; megalite.pretrain --trace-steps N writes a trace into a run's folder"
        ) from None
    except PlanError as error:
        raise DataError(str(error)) from None
    problems: list[str] = []
    ranks: list[list[RankStep]] = []
    for rank in range(plan.num_ranks):
        try:
            ranks.append(list(_read_rank(rank_file(folder, rank), plan, rank)))
        except DataError as error:
            problems += error.violations
    if problems:
        raise DataError(problems)
    numbers = {tuple(step.step for step in steps) for steps in ranks}
    if len(numbers) > 1 or numbers == {()}:
        listed = "; ".join(
            f"rank {rank}: {', '.join(str(step.step) for step in steps) or 'none'}"
            for rank, steps in enumerate(ranks)
        )
        raise DataError(f"{folder / FOLDER}: the ranks recorded different steps: {listed}")
    by_step = {steps[0].step: steps for steps in zip(*ranks, strict=True)}
    return Trace(plan, by_step)


def _read_rank(path: Path, plan: Plan, rank: int) -> Iterator[RankStep]:
    """The steps of one rank's file.

    Raises:
        DataError: a line is none of this format, or a step lacks a part or an action.
    """
    parts: dict[int, list[Part]] = {}
    spans: dict[int, list[Span]] = defaultdict(list)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise DataError(f"{path}: {why}") from None
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
            if number == 1:
                if (line["rank"], line["ranks"]) != (rank, plan.num_ranks):
                    raise ValueError(f"expected rank {rank} of {plan.num_ranks}")
            elif "part" in line:
                part = Part(line["part"], float(line["start"]), float(line["end"]))
                parts.setdefault(line["step"], []).append(part)
            else:
                spans[line["step"]].append(_read_span(line, rank))
        except KeyError as error:
            raise DataError(f"{path}, line {number}: {error} is missing") from None
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}, line {number}: {error}") from None
    for step, own in parts.items():
        names = tuple(part.name for part in own)
        if names != PARTS:
            raise DataError(f"{path}: step {step} has the parts {names}, expected {PARTS}")
        found = tuple(span.action for span in spans[step])
        if found != plan.ranks[rank]:
            raise DataError(f"{path}: step {step} has other actions than rank {rank} of the plan")
        yield RankStep(step, tuple(own), tuple(spans[step]))


def _read_span(line: Mapping[str, Any], rank: int) -> Span:
    return Span(
        rank,
        Action.parse(line["action"]),
        float(line["start"]),
        float(line["end"]),
        int(line.get("waits_for", -1)),
        float(line.get("waited", 0.0)),
    )
