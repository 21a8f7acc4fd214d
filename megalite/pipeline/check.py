"""Is a plan whole, and does its program end? Decided before anything runs. No torch import."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from itertools import zip_longest
from types import MappingProxyType

from megalite.parallel.topology import Topology
from megalite.pipeline.actions import (
    COMPUTE,
    SENDS,
    Action,
    Exchange,
    Op,
    Plan,
    PlanError,
    Program,
)

# The operation at the other end of a message, and how many stages away that end is.
_COUNTERPART: Mapping[Op, tuple[Op, int]] = MappingProxyType(
    {
        Op.SEND_FORWARD: (Op.RECV_FORWARD, 1),
        Op.RECV_FORWARD: (Op.SEND_FORWARD, -1),
        Op.SEND_BACKWARD: (Op.RECV_BACKWARD, -1),
        Op.RECV_BACKWARD: (Op.SEND_BACKWARD, 1),
    }
)


def check_plan(plan: Plan) -> None:
    """Each action exactly once, on the rank that owns its stage, a forward before its backward.

    Raises:
        PlanError: with every violation, the rank and the action named.
    """
    problems = []
    ops = COMPUTE if plan.has_backward else (Op.FORWARD,)
    wanted = {
        Action(stage, op, i)
        for stage in range(plan.num_stages)
        for op in ops
        for i in range(plan.num_micro_batches)
    }
    seen: Counter[Action] = Counter()
    for rank, order in enumerate(plan.ranks):
        for action in order:
            if action not in wanted:
                problems.append(f"rank {rank}: {action} is not an action of this plan")
                continue
            if plan.stage_rank[action.stage] != rank:
                owner = plan.stage_rank[action.stage]
                problems.append(f"rank {rank}: {action} belongs to rank {owner}")
            forward = Action(action.stage, Op.FORWARD, action.micro_batch)
            if action.op is Op.BACKWARD and not seen[forward]:
                problems.append(f"rank {rank}: {action} stands before {forward}")
            seen[action] += 1
    problems += [f"{action} stands {n} times" for action, n in seen.items() if n > 1]
    problems += [f"{action} is missing" for action in sorted(wanted - set(seen), key=str)]
    if problems:
        raise PlanError(f"plan {plan.name}: " + "; ".join(problems))


def check_program(program: Program) -> None:
    """The plan is whole, both ends of each channel agree on the order, and no rank waits forever.

    Messages are taken to block as strictly as any back end may: an exchange ends only when all its
    messages have met their counterparts, and a rank does nothing else meanwhile.

    Raises:
        PlanError: naming the ranks that would hang and the action each of them waits in.
    """
    check_plan(program.plan)
    _check_steps(program)
    _check_inputs(program)
    _check_channels(program)
    stuck = find_deadlock(program)
    if stuck:
        waiting = ", ".join(f"rank {rank} in {action}" for rank, action in stuck)
        raise PlanError(f"plan {program.plan.name} would hang: {waiting}")


def peer_rank(plan: Plan, message: Action) -> int:
    """Pipeline rank at the other end of a message."""
    return plan.stage_rank[message.stage + _COUNTERPART[message.op][1]]


def counterpart(message: Action) -> Action:
    """The same message as its other end names it."""
    op, step = _COUNTERPART[message.op]
    return Action(message.stage + step, op, message.micro_batch)


def message_number(plan: Plan, message: Action) -> int:
    """A number of its own for each message of a plan, the same at both ends."""
    received = counterpart(message) if message.op in SENDS else message
    kind = received.stage * 2 + (received.op is Op.RECV_BACKWARD)
    return kind * plan.num_micro_batches + received.micro_batch


def send_positions(program: Program, topology: Topology) -> dict[tuple[int, str], int]:
    """(world rank, message as its receiver names it) -> index of the step that sends it."""
    found = {}
    for world_rank in range(topology.world_size):
        for index, step in enumerate(program.ranks[topology.coordinates(world_rank).pp]):
            for message in step.messages if isinstance(step, Exchange) else ():
                if message.op in SENDS:
                    found[world_rank, str(counterpart(message))] = index
    return found


def find_deadlock(program: Program) -> list[tuple[int, Action]]:
    """Ranks that never reach their end, with the message each waits for; empty if all do."""
    position = [0] * len(program.ranks)
    posted: dict[Action, int] = {}
    done: set[Action] = set()
    progress = True
    while progress:
        progress = False
        for rank, steps in enumerate(program.ranks):
            while position[rank] < len(steps):
                step = steps[position[rank]]
                if isinstance(step, Exchange):
                    for message in step.messages:
                        posted[message] = rank
                        if counterpart(message) in posted:
                            done |= {message, counterpart(message)}
                    if not all(message in done for message in step.messages):
                        break
                position[rank] += 1
                progress = True
    stuck = []
    for rank, steps in enumerate(program.ranks):
        if position[rank] < len(steps):
            step = steps[position[rank]]
            assert isinstance(step, Exchange), "computation never blocks"
            stuck.append((rank, next(m for m in step.messages if m not in done)))
    return stuck


def _check_steps(program: Program) -> None:
    """Each rank computes what the plan says, and each message stands once, on its own rank."""
    plan, problems = program.plan, []
    seen: Counter[Action] = Counter()
    for rank, (order, steps) in enumerate(zip(plan.ranks, program.ranks, strict=True)):
        computed = tuple(step for step in steps if isinstance(step, Action))
        if computed != order:
            a, b = next((a, b) for a, b in zip_longest(order, computed) if a != b)
            problems.append(f"rank {rank}: {a or 'nothing'} is planned where {b or 'nothing'} runs")
        for message in (m for s in steps if isinstance(s, Exchange) for m in s.messages):
            seen[message] += 1
            if not _is_message(plan, message):
                problems.append(f"rank {rank}: {message} has no rank at its other end")
            elif plan.stage_rank[message.stage] != rank:
                owner = plan.stage_rank[message.stage]
                problems.append(f"rank {rank}: {message} belongs to rank {owner}")
    problems += [f"{message} stands {n} times" for message, n in seen.items() if n > 1]
    if problems:
        raise PlanError(f"plan {plan.name}: " + "; ".join(problems))


def _is_message(plan: Plan, action: Action) -> bool:
    """Whether both ends exist, on two ranks."""
    if action.op not in _COUNTERPART:
        return False
    ends = (action.stage, counterpart(action).stage)
    if not all(0 <= stage < plan.num_stages for stage in ends):
        return False
    return plan.stage_rank[ends[0]] != plan.stage_rank[ends[1]]


def _check_inputs(program: Program) -> None:
    """Every action finds its input made or received before it."""
    plan, problems = program.plan, []
    for rank, steps in enumerate(program.ranks):
        have: set[Action] = set()
        for step in steps:
            for action in step.messages if isinstance(step, Exchange) else (step,):
                problems += [
                    f"rank {rank}: {action} lacks {needed}"
                    for needed in _inputs(plan, rank, action)
                    if needed not in have
                ]
                have.add(action)
    if problems:
        raise PlanError(f"plan {plan.name}: " + "; ".join(problems))


def _inputs(plan: Plan, rank: int, action: Action) -> list[Action]:
    stage, i = action.stage, action.micro_batch
    needed = []
    if action.op is Op.FORWARD and stage > 0:
        local = plan.stage_rank[stage - 1] == rank
        needed.append(
            Action(stage - 1, Op.FORWARD, i) if local else Action(stage, Op.RECV_FORWARD, i)
        )
    elif action.op is Op.BACKWARD and stage < plan.num_stages - 1:
        local = plan.stage_rank[stage + 1] == rank
        needed.append(
            Action(stage + 1, Op.BACKWARD, i) if local else Action(stage, Op.RECV_BACKWARD, i)
        )
    elif action.op is Op.SEND_FORWARD:
        needed.append(Action(stage, Op.FORWARD, i))
    elif action.op is Op.SEND_BACKWARD:
        needed.append(Action(stage, Op.BACKWARD, i))
    return needed


def _check_channels(program: Program) -> None:
    """What a rank sends to another is what that one receives, in the same order."""
    sent: dict[tuple[int, int], list[Action]] = defaultdict(list)
    received: dict[tuple[int, int], list[Action]] = defaultdict(list)
    for rank, steps in enumerate(program.ranks):
        for step in steps:
            for message in step.messages if isinstance(step, Exchange) else ():
                peer = peer_rank(program.plan, message)
                if message.op in SENDS:
                    sent[rank, peer].append(counterpart(message))
                else:
                    received[peer, rank].append(message)
    for channel in sorted(set(sent) | set(received)):
        source, target = channel
        here, there = sent[channel], received[channel]
        for a, b in zip(here, there, strict=False):
            if a != b:
                raise PlanError(
                    f"plan {program.plan.name}: rank {source} sends {counterpart(a)} where rank "
                    f"{target} receives {b}"
                )
        if len(here) > len(there):
            raise PlanError(
                f"plan {program.plan.name}: rank {target} never receives "
                f"{counterpart(here[len(there)])} of rank {source}"
            )
        if len(there) > len(here):
            raise PlanError(
                f"plan {program.plan.name}: rank {source} never sends what rank {target} awaits "
                f"in {there[len(here)]}"
            )
