"""When each action of a program would run, given how long they take. No torch import."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from megalite.pipeline.actions import Action, Program
from megalite.pipeline.channels import (
    as_received,
    counterpart,
    goes_later,
    is_message,
    peer_rank,
    received_for,
)
from megalite.pipeline.costs import Costs


@dataclass(frozen=True)
class Span:
    """One computation of one rank, in the costs' unit of time.

    Attributes:
        rank, action: what runs where.
        start, end: when.
        waits_for: rank whose message kept it waiting; -1 if it began as soon as its rank was free.
        waited: for how long.
    """

    rank: int
    action: Action
    start: float
    end: float
    waits_for: int = -1
    waited: float = 0.0


@dataclass(frozen=True)
class Timeline:
    """A simulated or measured step.

    Attributes:
        spans: all computations.
        makespan: from the step's begin to the end of the last one.
        num_ranks: of the pipeline.
    """

    spans: tuple[Span, ...]
    makespan: float
    num_ranks: int

    def busy(self, rank: int) -> float:
        """Time in which a rank computes."""
        return sum(span.end - span.start for span in self.spans if span.rank == rank)

    def bubble(self) -> float:
        """Idle share of the ranks' time."""
        busy = sum(span.end - span.start for span in self.spans)
        return 1.0 - busy / (self.num_ranks * self.makespan)

    def bubble_of_spans(self) -> float:
        """Idle share of the rank that is busy least, from its own first begin to its last end.

        What the zero-bubble papers count: the time until the first micro-batch arrives is not in
        it.
        """
        shares = []
        for rank in range(self.num_ranks):
            own = [span for span in self.spans if span.rank == rank]
            length = max(span.end for span in own) - min(span.start for span in own)
            shares.append(1.0 - self.busy(rank) / length)
        return max(shares)


class DeadlockError(Exception):
    """A program that does not end.

    Attributes:
        waiting: ranks that never reach their end, each with the message that it waits for.
    """

    def __init__(self, waiting: list[tuple[int, Action]]):
        super().__init__(", ".join(f"rank {rank} in {action}" for rank, action in waiting))
        self.waiting = waiting


def simulate(program: Program, costs: Costs) -> Timeline:
    """Run a program against a clock.

    A computation starts when the rank is free and its input has arrived; a message when both of its
    ends have started it, in the order of their channels, and after what the rank computed before it
    was started. See `megalite.pipeline.channels`.

    Raises:
        DeadlockError: it would never end.
    """
    return _Run(program, costs).timeline()


class _Run:
    """The state of a simulation: how far each rank has come, and each of its channels."""

    def __init__(self, program: Program, costs: Costs):
        self._plan, self._costs, self._steps = program.plan, costs, program.ranks
        ranks = range(len(program.ranks))
        self._position = [0 for _ in ranks]
        self._now = [0.0 for _ in ranks]
        self._channels = {(rank, later): _Channel() for rank in ranks for later in (True, False)}
        self._arrived: dict[Action, float] = {}
        self._spans: list[Span] = []

    def timeline(self) -> Timeline:
        """Run to the end."""
        todo = deque(range(len(self._steps)))
        while todo:
            rank = todo.popleft()
            for other in self._advance(rank):
                if other not in todo:
                    todo.append(other)
        waiting = list(self._waiting())
        if waiting:
            raise DeadlockError(waiting)
        spans = tuple(sorted(self._spans, key=lambda span: (span.start, span.rank)))
        end = max((span.end for span in spans), default=0.0)
        return Timeline(spans, end, len(self._steps))

    def _advance(self, rank: int) -> set[int]:
        """Take the rank as far as it goes; returns those for which something may have changed."""
        changed: set[int] = set()
        steps = self._steps[rank]
        while self._position[rank] < len(steps):
            step = steps[self._position[rank]]
            if is_message(step):
                later = goes_later(self._plan, step)
                self._channels[rank, later].started.append((step, self._now[rank]))
                changed |= self._move(rank, later)
            elif not self._compute(rank, step):
                break
            self._position[rank] += 1
        return changed

    def _compute(self, rank: int, action: Action) -> bool:
        """Run a computation if its input has come."""
        message = received_for(self._plan, action)
        free, peer, waited = self._now[rank], -1, 0.0
        if message is not None and peer_rank(self._plan, message) != rank:
            arrived = self._arrived.get(message)
            if arrived is None:
                return False
            if arrived > free:
                peer, waited = peer_rank(self._plan, message), arrived - free
        start = free + waited
        end = start + self._costs.of(action)
        self._spans.append(Span(rank, action, start, end, peer, waited))
        self._now[rank] = end
        return True

    def _move(self, rank: int, later: bool) -> set[int]:
        """Let the messages pass that are first at both of their ends."""
        changed: set[int] = set()
        todo = [rank]
        while todo:
            here = todo.pop()
            channel = self._channels[here, later]
            if not channel.started:
                continue
            message, begun = channel.started[0]
            there = peer_rank(self._plan, message)
            other = self._channels[there, later]
            if not other.started or other.started[0][0] != counterpart(message):
                continue
            start = max(begun, other.started[0][1], channel.free, other.free)
            channel.free = other.free = start + self._costs.message
            channel.started.popleft()
            other.started.popleft()
            self._arrived[as_received(message)] = channel.free
            changed |= {here, there}
            todo += [here, there]
        return changed

    def _waiting(self) -> Iterator[tuple[int, Action]]:
        for rank, steps in enumerate(self._steps):
            if self._position[rank] < len(steps):
                message = received_for(self._plan, steps[self._position[rank]])
                assert message is not None, "computation waits for messages only"
                yield rank, message
                continue
            for later in (True, False):
                if self._channels[rank, later].started:
                    yield rank, self._channels[rank, later].started[0][0]
                    break


class _Channel:
    """Messages of one direction that a rank has started, with when; and when the last one ended."""

    def __init__(self) -> None:
        self.started: deque[tuple[Action, float]] = deque()
        self.free = 0.0
