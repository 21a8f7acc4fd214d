"""From a plan to a program: write the messages between ranks into it. No torch import."""

from __future__ import annotations

from megalite.pipeline.actions import Action, Exchange, Op, Plan, Program, Step


def lower(plan: Plan) -> Program:
    """Receive just before an action needs its input, send just after it made its output.

    Messages that follow each other with no computation between them are one exchange: so the
    forward of one direction crosses with the backward of the other, as in 1F1B's steady state.
    """
    return Program(plan, tuple(_lower_rank(plan, order) for order in plan.ranks))


def _lower_rank(plan: Plan, order: tuple[Action, ...]) -> tuple[Step, ...]:
    steps: list[Step] = []
    pending: list[Action] = []
    for action in order:
        pending += _needs(plan, action)
        if pending:
            steps.append(Exchange(tuple(pending)))
        steps.append(action)
        pending = _makes(plan, action)
    if pending:
        steps.append(Exchange(tuple(pending)))
    return tuple(steps)


def _needs(plan: Plan, action: Action) -> list[Action]:
    stage, micro_batch = action.stage, action.micro_batch
    if action.op is Op.FORWARD and _is_remote(plan, stage, stage - 1):
        return [Action(stage, Op.RECV_FORWARD, micro_batch)]
    if action.op is Op.BACKWARD and _is_remote(plan, stage, stage + 1):
        return [Action(stage, Op.RECV_BACKWARD, micro_batch)]
    return []


def _makes(plan: Plan, action: Action) -> list[Action]:
    stage, micro_batch = action.stage, action.micro_batch
    if action.op is Op.FORWARD and _is_remote(plan, stage, stage + 1):
        return [Action(stage, Op.SEND_FORWARD, micro_batch)]
    if action.op is Op.BACKWARD and _is_remote(plan, stage, stage - 1):
        return [Action(stage, Op.SEND_BACKWARD, micro_batch)]
    return []


def _is_remote(plan: Plan, stage: int, other: int) -> bool:
    """Whether the other stage exists and lies on another rank."""
    ranks = plan.stage_rank
    return 0 <= other < plan.num_stages and ranks[stage] != ranks[other]
