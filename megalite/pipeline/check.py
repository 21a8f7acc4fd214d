"""Is a plan whole, and does its program end? Decided before anything runs. No torch import."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence, Set
from itertools import zip_longest

from megalite.pipeline.actions import (
    COMPUTE,
    SENDS,
    Action,
    Op,
    Plan,
    PlanError,
    Program,
)
from megalite.pipeline.channels import (
    as_received,
    counterpart,
    is_message,
    peer_rank,
)

_MOST_TOLD = 20
"""Problems of one plan; a plan with one action missing often lacks a thousand others."""


def check_plan(plan: Plan) -> None:
    """Each action exactly once, on the rank that owns its stage, after what it needs of that rank.

    A micro-batch's backward on a stage is whole, or split into both of its gradients.

    Raises:
        PlanError: with the violations, the rank and the action named.
    """
    _refuse(plan, [*_placed_wrongly(plan), *_counted_wrongly(plan), *_ordered_wrongly(plan)])


def check_program(program: Program) -> None:
    """The plan is whole, both ends of each channel agree on the order, and no rank waits forever.

    Not even if each rank waits for every message before it goes on; see `find_deadlock`.

    Raises:
        PlanError: naming the ranks that would hang and the action each of them waits in.
    """
    check_plan(program.plan)
    _refuse(program.plan, _computed_otherwise(program))
    _refuse(program.plan, [*_wrong_messages(program), *_unsupplied(program)])
    _refuse(program.plan, _crossed(program))
    stuck = find_deadlock(program)
    if stuck:
        waiting = ", ".join(f"rank {rank} in {action}" for rank, action in stuck)
        raise PlanError(f"plan {program.plan.name} would hang: {waiting}")


def find_deadlock(program: Program) -> list[tuple[int, Action]]:
    """Ranks that never reach their end, with the message each waits for; empty if all do.

    A message passes when both of its ends have come to it, and neither goes on before. No back end
    is stricter than that, but some are as strict at times: see `megalite.pipeline.lower`.
    """
    plan = program.plan
    position = [0] * len(program.ranks)

    def message(rank: int) -> Action | None:
        """The message that a rank has come to; None at its end."""
        steps = program.ranks[rank]
        while position[rank] < len(steps) and not is_message(steps[position[rank]]):
            position[rank] += 1
        return steps[position[rank]] if position[rank] < len(steps) else None

    todo = deque(range(len(position)))
    while todo:
        rank = todo.popleft()
        here = message(rank)
        if here is None:
            continue
        peer = peer_rank(plan, here)
        if message(peer) == counterpart(here):
            for end in (rank, peer):
                position[end] += 1
            todo += [rank, peer]
    waiting = [(rank, message(rank)) for rank in range(len(position))]
    return [(rank, here) for rank, here in waiting if here is not None]


def _refuse(plan: Plan, problems: Sequence[str]) -> None:
    if problems:
        told = list(problems[:_MOST_TOLD])
        if len(problems) > len(told):
            told.append(f"and {len(problems) - len(told)} more")
        raise PlanError(f"plan {plan.name}: " + "; ".join(told))


def _placed_wrongly(plan: Plan) -> Iterator[str]:
    """Actions that the model does not have, or another rank does."""
    ops = COMPUTE if plan.has_backward else (Op.FORWARD,)
    for rank, order in enumerate(plan.ranks):
        for action in order:
            if action.stage >= plan.num_stages:
                last = plan.num_stages - 1
                yield f"rank {rank}: {action} names stage {action.stage}, the last is {last}"
            elif action.op not in ops:
                yield f"rank {rank}: {action} is not an action of this plan"
            elif action.micro_batch >= plan.num_micro_batches:
                yield (
                    f"rank {rank}: {action} names micro-batch {action.micro_batch}, the last is "
                    f"{plan.num_micro_batches - 1}"
                )
            elif plan.stage_rank[action.stage] != rank:
                yield f"rank {rank}: {action} belongs to rank {plan.stage_rank[action.stage]}"


def _counted_wrongly(plan: Plan) -> Iterator[str]:
    """Actions that are missing, or stand more than once."""
    for rank, order in enumerate(plan.ranks):
        for action, n in Counter(order).items():
            if n > 1:
                yield f"rank {rank}: {action} stands {n} times"
    seen = {action for order in plan.ranks for action in order}
    for stage, rank in enumerate(plan.stage_rank):
        for i in range(plan.num_micro_batches):
            for problem in _incomplete(plan, seen, stage, i):
                yield f"rank {rank}: {problem}"


def _incomplete(plan: Plan, seen: Set[Action], stage: int, micro_batch: int) -> Iterator[str]:
    """What a micro-batch lacks on a stage, or has in two ways."""
    forward, whole, inputs, weights = (Action(stage, op, micro_batch) for op in COMPUTE)
    if forward not in seen:
        yield f"{forward} is missing"
    if not plan.has_backward:
        return
    if whole in seen and (inputs in seen or weights in seen):
        part = inputs if inputs in seen else weights
        yield f"{whole} and {part} both stand: a backward is whole or split"
    elif whole not in seen and inputs not in seen and weights not in seen:
        yield f"{whole} is missing"
    elif whole not in seen:
        yield from (f"{part} is missing" for part in (inputs, weights) if part not in seen)


def _ordered_wrongly(plan: Plan) -> Iterator[str]:
    """Actions that stand before something on their own rank that they need."""
    for rank, order in enumerate(plan.ranks):
        all_here, seen = set(order), set[Action]()
        for action in order:
            for needed in _needs_here(plan, action):
                if needed in all_here and needed not in seen:
                    yield f"rank {rank}: {action} stands before {needed}"
            seen.add(action)


def _needs_here(plan: Plan, action: Action) -> Iterator[Action]:
    """What has to stand before an action if it stands on the same rank."""
    stage, i = action.stage, action.micro_batch
    if action.op is Op.WEIGHT_GRADIENT:
        yield Action(stage, Op.INPUT_GRADIENT, i)
    elif action.op is not Op.FORWARD:
        yield Action(stage, Op.FORWARD, i)
    source = plan.source(action)
    if source is not None:
        neighbour, direction = source
        yield Action(neighbour, direction, i)
        if direction is Op.BACKWARD:
            yield Action(neighbour, Op.INPUT_GRADIENT, i)


def _computed_otherwise(program: Program) -> list[str]:
    """Where a rank computes something else than the plan says."""
    problems = []
    for rank, (order, steps) in enumerate(zip(program.plan.ranks, program.ranks, strict=True)):
        computed = tuple(step for step in steps if not is_message(step))
        if computed != order:
            a, b = next((a, b) for a, b in zip_longest(order, computed) if a != b)
            problems.append(f"rank {rank}: {a or 'nothing'} is planned where {b or 'nothing'} runs")
    return problems


def _wrong_messages(program: Program) -> Iterator[str]:
    """Messages that stand more than once, on another's rank, or have no other end."""
    plan, seen = program.plan, Counter[Action]()
    for rank, steps in enumerate(program.ranks):
        for message in filter(is_message, steps):
            seen[message] += 1
            ends = (message.stage, counterpart(message).stage)
            if not all(0 <= stage < plan.num_stages for stage in ends) or not plan.is_remote(*ends):
                yield f"rank {rank}: {message} has no rank at its other end"
            elif plan.stage_rank[message.stage] != rank:
                yield f"rank {rank}: {message} belongs to rank {plan.stage_rank[message.stage]}"
    yield from (f"{message} stands {n} times" for message, n in seen.items() if n > 1)


def _unsupplied(program: Program) -> Iterator[str]:
    """Actions whose input is neither made nor received before them."""
    plan = program.plan
    for rank, steps in enumerate(program.ranks):
        have: set[tuple[int, Op, int]] = set()
        for step in steps:
            stage, i = step.stage, step.micro_batch
            needed, made = None, None
            if step.op is Op.SEND_FORWARD:
                needed = (stage, Op.FORWARD)
            elif step.op is Op.SEND_BACKWARD:
                needed = (stage, Op.BACKWARD)
            elif step.op is Op.RECV_FORWARD:
                made = (stage - 1, Op.FORWARD)
            elif step.op is Op.RECV_BACKWARD:
                made = (stage + 1, Op.BACKWARD)
            else:
                needed = plan.source(step)
                if step.op is not Op.WEIGHT_GRADIENT:
                    made = (stage, Op.FORWARD if step.op is Op.FORWARD else Op.BACKWARD)
            if needed is not None and (*needed, i) not in have:
                yield f"rank {rank}: {step} lacks {_supply(plan, rank, needed, step)}"
            if made is not None:
                have.add((*made, i))


def _supply(plan: Plan, rank: int, needed: tuple[int, Op], step: Action) -> Action:
    """The action that would supply a step."""
    stage, direction = needed
    if plan.stage_rank[stage] == rank:
        return Action(stage, direction, step.micro_batch)
    return Action(step.stage, Op(f"RECV_{direction}"), step.micro_batch)


def _crossed(program: Program) -> list[str]:
    """Where one end of a pair of ranks does not name the same messages in the same order."""
    plan = program.plan
    sent: dict[tuple[int, int], list[Action]] = defaultdict(list)
    received: dict[tuple[int, int], list[Action]] = defaultdict(list)
    for rank, steps in enumerate(program.ranks):
        for message in filter(is_message, steps):
            peer = peer_rank(plan, message)
            if message.op in SENDS:
                sent[rank, peer].append(as_received(message))
            else:
                received[peer, rank].append(message)
    problems = []
    for source, target in sorted(set(sent) | set(received)):
        for here, there in zip_longest(sent[source, target], received[source, target]):
            if here is None:
                problems.append(f"rank {source} never sends what rank {target} awaits in {there}")
            elif there is None:
                problems.append(f"rank {target} never receives {here} of rank {source}")
            elif here != there:
                problems.append(f"rank {source} sends {here} where rank {target} receives {there}")
                break
    return problems
