"""Who keeps whom waiting: from the ranks' last words to a table and a verdict. No torch import."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Calls:
    """A rank's collectives in one group.

    Attributes:
        ranks: world ranks of the group.
        called: how many it has called there.
        waiting: number of the one that it is waiting for; 0 if for none.
        names: the last ones' by number.
    """

    ranks: tuple[int, ...]
    called: int
    waiting: int
    names: Mapping[int, str]


@dataclass(frozen=True)
class State:
    """What one rank last said of itself.

    Attributes:
        rank: world rank.
        beat: how many times it has spoken.
        phase, doing: see `Activity`.
        phase_s: how long the phase has lasted [s].
        phases: how many have begun; all ranks begin the same ones.
        still_s: how long nothing has changed in what it says [s].
        device: what its GPU is in, with its phase; empty if nothing is under way, or there is none.
        awaits: the message it is waiting for, as its program names it: `1RECV_F3`; or empty.
        peer: world rank at the message's other end; -1 without a message.
        position: of its action in its program: of the one that its GPU is in, if there is one;
            so are `awaits` and `peer`.
        position_phase: the phase of that.
        calls: its collectives by group.
        patient: it takes as long as it takes.
        heeds: it stops after a step if it is asked to.
        shares: of its time in steps lately, by what it was doing; empty if it is too early to say.
        host: its machine.
        ended: it has left its job.
    """

    rank: int
    beat: int
    phase: str
    doing: str
    phase_s: float
    phases: int = 0
    still_s: float = 0.0
    device: str = ""
    awaits: str = ""
    peer: int = -1
    position: int = -1
    position_phase: str = ""
    calls: Mapping[str, Calls] = field(default_factory=dict)
    patient: bool = False
    heeds: bool = False
    shares: Mapping[str, float] = field(default_factory=dict)
    host: str = ""
    ended: bool = False

    def doings(self) -> tuple:
        """What changes when something moves."""
        calls = [(call.called, call.waiting) for call in self.calls.values()]
        return (self.phases, self.doing, self.device, self.position, self.ended, *calls)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> State:
        """Inverse of `to_json`."""
        calls = {
            group: Calls(
                ranks=tuple(call["ranks"]),
                called=call["called"],
                waiting=call["waiting"],
                names={int(number): name for number, name in call["names"].items()},
            )
            for group, call in values["calls"].items()
        }
        return cls(**{**values, "calls": calls})


@dataclass(frozen=True)
class Explanation:
    """Why nothing moves.

    Attributes:
        culprits: a sentence for each rank that others wait for and that waits for nobody.
        table: one line for each rank.
    """

    culprits: tuple[str, ...]
    table: tuple[str, ...]

    def text(self) -> str:
        """All of it."""
        return "\n".join([*(f"  {line}" for line in self.table), *self.culprits])


def explain(
    states: Sequence[State | None],
    lost: Collection[int],
    sends: Mapping[tuple[int, str], int],
) -> Explanation:
    """Find who keeps the others waiting.

    Args:
        states: of all ranks, by world rank; None of one that never said anything.
        lost: ranks that no longer speak.
        sends: (world rank, message as its receiver names it) -> index in the program of that rank
            of the action that sends it: tells a message that was forgotten from one to come.
    """
    waits = {
        state.rank: _waits_for(state, states, sends)
        for state in states
        if state is not None and state.rank not in lost and not state.ended
    }
    culprits = [_lost(rank, states[rank]) for rank in sorted(lost)]
    for state in states:
        if state is not None and state.ended and waits:
            others = next(s for s in states if s is not None and s.rank in waits)
            culprits.append(f"rank {state.rank} has ended, but others are in {_place(others)}")
    for edges in waits.values():
        culprits += [why for why in edges.blames if why not in culprits]
    awaited = {other for edges in waits.values() for other in edges.ranks}
    for rank in sorted(awaited & set(waits)):
        state = states[rank]
        if state is not None and waits[rank] == _Waits():
            culprits.append(
                f"rank {rank} never arrived: it is in {_place(state)}; {_whom(waits, rank)}"
            )
    return Explanation(
        tuple(culprits or _circle(waits, states) or _fewest_phases(states, waits)),
        tuple(_line(rank, state, rank in lost) for rank, state in enumerate(states)),
    )


@dataclass(frozen=True)
class _Waits:
    """Ranks that a rank waits for, and what is wrong beyond waiting."""

    ranks: frozenset[int] = frozenset()
    blames: tuple[str, ...] = ()


def _waits_for(
    state: State, states: Sequence[State | None], sends: Mapping[tuple[int, str], int]
) -> _Waits:
    for group, calls in state.calls.items():
        if calls.waiting:
            return _in_collective(state, group, calls, states)
    if state.peer < 0:
        # Collectives on a GPU do not wait on the host; those who called fewer are behind.
        return _Waits(_behind(state, states) if state.device else frozenset())
    peer, sent_by = states[state.peer], sends.get((state.peer, state.awaits))
    is_past = (
        peer is not None
        and sent_by is not None
        and peer.position_phase == state.position_phase
        and peer.position > sent_by
    )
    if peer is None or not is_past:
        return _Waits(frozenset({state.peer}))
    why = (
        f"rank {state.peer} is past the action that sends what rank {state.rank} awaits in "
        f"{state.awaits}: it was not sent, or sent to another rank; rank {state.peer} is in "
        f"{_place(peer)}"
    )
    return _Waits(blames=(why,))


def _behind(state: State, states: Sequence[State | None]) -> frozenset[int]:
    """Members of this rank's groups whose hosts have called fewer collectives there."""
    found = set()
    for group, mine in state.calls.items():
        for rank in mine.ranks:
            other = states[rank]
            theirs = other.calls.get(group) if other is not None else None
            if theirs is None or theirs.called < mine.called:
                found.add(rank)
    return frozenset(found)


def _in_collective(
    state: State, group: str, calls: Calls, states: Sequence[State | None]
) -> _Waits:
    """Members of the group that have not called the collective yet; or that called another."""
    behind, blames = set(), []
    mine = calls.names.get(calls.waiting)
    for rank in calls.ranks:
        other = states[rank]
        theirs = other.calls.get(group) if other is not None else None
        if rank == state.rank:
            continue
        if theirs is None or theirs.called < calls.waiting:
            behind.add(rank)
        elif mine is not None and theirs.names.get(calls.waiting, mine) != mine:
            first, second = sorted([(state.rank, mine), (rank, theirs.names[calls.waiting])])
            blames.append(
                f"ranks {first[0]} and {second[0]} disagree on collective {calls.waiting} of their "
                f"{group} group: {first[1]} and {second[1]}"
            )
    return _Waits(frozenset(behind), tuple(blames))


def _lost(rank: int, state: State | None) -> str:
    if state is None:
        return f"rank {rank} never arrived: it has said nothing since the start"
    return f"rank {rank} is dead or stopped: no sign of life since it was in {_place(state)}"


def _whom(waits: Mapping[int, _Waits], rank: int) -> str:
    waiting = sorted(other for other, edges in waits.items() if rank in edges.ranks)
    names = ", ".join(map(str, waiting))
    return f"ranks {names} wait for it" if len(waiting) > 1 else f"rank {names} waits for it"


def _circle(waits: Mapping[int, _Waits], states: Sequence[State | None]) -> list[str]:
    """Ranks that wait for each other, and in what."""
    start = next((rank for rank, edges in waits.items() if edges.ranks), None)
    if start is None:
        return []
    path = [start]
    while path[-1] not in path[:-1] and waits.get(path[-1], _Waits()).ranks:
        path.append(min(waits[path[-1]].ranks))
    circle = path[path.index(path[-1]) :]
    steps = ", ".join(f"rank {a} for rank {b}{_in_what(states[a])}" for a, b in pairwise(circle))
    return [f"ranks wait for each other: {steps}"]


def _in_what(state: State | None) -> str:
    """What a rank that waits is in."""
    if state is None:
        return ""
    found = [_collective(calls, group) for group, calls in state.calls.items() if calls.waiting]
    return f" in {(found or [state.awaits])[0]}" if found or state.awaits else ""


def _collective(calls: Calls, group: str) -> str:
    """`broadcast (number 7 of its data group)`: the one that is waited for."""
    name = calls.names.get(calls.waiting, "a collective")
    return f"{name} (number {calls.waiting} of its {group} group)"


def _fewest_phases(states: Sequence[State | None], waits: Mapping[int, _Waits]) -> list[str]:
    """Ranks that have begun fewer phases than others."""
    alive = [state for state in states if state is not None and state.rank in waits]
    fewest = min((state.phases for state in alive), default=0)
    behind = [state for state in alive if state.phases == fewest]
    if len(behind) == len(alive):
        return ["no rank waits for another: see the table"]
    return [f"rank {state.rank} is behind all others: it is in {_place(state)}" for state in behind]


def _place(state: State) -> str:
    return ", ".join(text for text in (state.phase, state.doing) if text)


def _line(rank: int, state: State | None, is_lost: bool) -> str:
    if state is None:
        return f"rank {rank}: nothing heard"
    text = f"rank {rank}: {_place(state)}"
    for group, calls in state.calls.items():
        if calls.waiting:
            others = ", ".join(str(other) for other in calls.ranks if other != rank)
            several = "s" if len(calls.ranks) > 2 else ""
            text += f", waiting in {_collective(calls, group)} with rank{several} {others}"
    text += f"; GPU in {state.device}" if state.device else ""
    if state.ended:
        return f"{text}; ended"
    return f"{text}; no longer heard" if is_lost else f"{text}; for {state.phase_s:.0f} s"
