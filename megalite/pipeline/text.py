"""Plans as text, for people to read, write and pass to `--schedule`. No torch import.

One line for each pipeline rank, with its computations in order; what follows a `#` is a comment:

    # 1f1b, 2 ranks, 2 micro-batches
    0F0 0F1 0B0 0B1
    1F0 1B0 1F1 1B1

An action is stage, operation, micro-batch (see `megalite.pipeline.actions`). Which rank owns a
stage is where its actions stand. Commas may stand between actions, as in the files of
`torch.distributed.pipelining`; its empty cells, where a rank waits, are skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count

from megalite.pipeline.actions import COMPUTE, Action, Plan, PlanError


def plan_text(plan: Plan) -> str:
    """The text of a plan."""
    heading = f"# {plan.name}, {plan.num_ranks} ranks, {plan.num_micro_batches} micro-batches"
    return "\n".join([heading, *(" ".join(map(str, order)) for order in plan.ranks)]) + "\n"


def parse_plan(text: str, name: str) -> Plan:
    """The plan of a text; not checked yet, see `megalite.pipeline.check`.

    Args:
        text: as above.
        name: of the plan, for messages.

    Raises:
        PlanError: with every word that is no computation, its line named; a stage that stands on
            two ranks, or none; a micro-batch that is left out.
    """
    problems: list[str] = []
    orders = [
        (number, list(_computations(number, content, problems))) for number, content in _lines(text)
    ]
    owners: dict[int, int] = {}
    for rank, (number, order) in enumerate(orders):
        for action in order:
            owner = owners.setdefault(action.stage, rank)
            if owner != rank:
                problems.append(
                    f"line {number}: {action} stands on rank {rank}, but its stage on rank {owner}"
                )
    micro_batches = {action.micro_batch for _, order in orders for action in order}
    problems += [*_gap("stage", set(owners)), *_gap("micro-batch", micro_batches)]
    if not owners and not problems:
        problems.append("no action stands in it")
    if problems:
        raise PlanError(f"plan {name}: " + "; ".join(problems[:20]))
    return Plan(
        name,
        len(micro_batches),
        tuple(owners[stage] for stage in range(len(owners))),
        tuple(tuple(order) for _, order in orders),
    )


def rank_lines(text: str) -> list[int]:
    """The line (1 first) on which each rank stands."""
    return [number for number, _ in _lines(text)]


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Number and content of each line that has any, comments left out."""
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.split("#", 1)[0].strip()
        if content:
            yield number, content


def _computations(number: int, content: str, problems: list[str]) -> Iterator[Action]:
    """The actions of a line; what is wrong with its words is added to the problems."""
    for word in filter(None, re.split(r"[\s,]+", content)):
        try:
            action = Action.parse(word)
        except ValueError as error:
            problems.append(f"line {number}: {error}")
            continue
        if action.op not in COMPUTE:
            problems.append(f"line {number}: {word} is a message; a plan names computations")
        yield action


def _gap(kind: str, numbers: set[int]) -> Iterator[str]:
    """The first number that is missing below the largest one."""
    missing = next(number for number in count() if number not in numbers)
    if numbers and missing < max(numbers):
        yield f"{kind} {missing} is missing, but {kind} {max(numbers)} is there"
