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
        PlanError: with every word that is no computation, its line named; or a stage that stands on
            two ranks, or none.
    """
    ranks: list[tuple[Action, ...]] = []
    problems: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.split("#", 1)[0].strip()
        if not content:
            continue
        order = []
        for word in filter(None, re.split(r"[\s,]+", content)):
            try:
                action = Action.parse(word)
            except ValueError as error:
                problems.append(f"line {number}: {error}")
                continue
            if action.op not in COMPUTE:
                problems.append(f"line {number}: {word} is a message; a plan names computations")
            order.append(action)
        ranks.append(tuple(order))
    owners: dict[int, int] = {}
    for rank, order in enumerate(ranks):
        for action in order:
            owner = owners.setdefault(action.stage, rank)
            if owner != rank:
                problems.append(f"{action} stands on rank {rank}, but its stage on rank {owner}")
    problems += [f"stage {s} is missing" for s in range(max(owners, default=0)) if s not in owners]
    if not owners and not problems:
        problems.append("no action stands in it")
    if problems:
        raise PlanError(f"plan {name}: " + "; ".join(problems[:20]))
    return Plan(
        name,
        1 + max(action.micro_batch for order in ranks for action in order),
        tuple(owners[stage] for stage in range(len(owners))),
        tuple(ranks),
    )
