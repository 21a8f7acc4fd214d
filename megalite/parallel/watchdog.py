"""A thread beside each rank that says what the rank is doing, and explains when nothing moves.

Every rank publishes its `State` a few times a second to a store that all can read. When a rank has
been in one phase for longer than it may and nothing moves on any rank, or when it has lost a peer,
one rank reads all states, prints who keeps whom waiting (`megalite.parallel.hang`), and all end.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from socket import gethostname

import torch.distributed as dist

from megalite.events import Events
from megalite.exit_codes import ExitCode
from megalite.parallel.activity import Activity, CallTrace
from megalite.parallel.hang import Calls, State, explain
from megalite.parallel.step_times import table
from megalite.parallel.stop import StopRequest
from megalite.parallel.stragglers import EVERY, Stragglers

INTERVAL_S = 0.2
SETS_PER_S = 500.0
"""Of all ranks together: one store serves them."""

STILL_S = 60.0
"""A rank in which something changed since then moves, slow as it may be [s]."""

SILENCE_S = 3.0
"""A rank that says nothing new for so long is taken for dead or stopped; in large worlds, which
speak less often, for fifteen intervals."""

SUSPENDED_S = 10.0
"""A thread that sleeps so much longer than it meant to has been stopped with its process."""

LINGER_S = 2.0
"""How long rank 0, which may keep the store, stays after the explanation: all have to read it."""

TURN_S = 0.1
"""One rank judges; the next ones wait so much longer each, in case it is the one that hangs."""

STOP = "stop"
"""Under this key a launcher leaves the name of the signal by which it was asked to stop."""

AT_ONCE = "stop at once"
"""Likewise, if it doesn't wait for the ranks to do so in order."""

STACKS = "stacks"
"""Folder in that of the run."""

Groups = dict[str, tuple[tuple[int, ...], CallTrace]]
"""World ranks and calls of each group of a rank."""


class Watchdog:
    """One rank's thread.

    Args:
        store: a connection of its own: the rank's thread may be waiting in another.
        rank, size: of the world.
        activity: of this rank.
        stop: asked here when the launcher asks all ranks.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, activity: Activity, stop: StopRequest
    ):
        self._store, self._rank, self._size = store, rank, size
        self._activity, self._stop = activity, stop
        self._folder: Path | None = None
        self._events = Events(None)
        self._host, self._stragglers = gethostname(), Stragglers()
        self._interval_s = max(INTERVAL_S, size / SETS_PER_S)
        self._silence_s = max(SILENCE_S, 15 * self._interval_s)
        self._groups: Groups = {}
        self._beat = 0
        self._said: tuple = ()
        self._changed = time.monotonic()
        self._heard: dict[int, tuple[int, float]] = {}
        self._speaking = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watchdog")

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def watch(self, groups: Groups, folder: Path | None, events: Events) -> None:
        """From now on say what this rank calls in its groups too.

        Args:
            groups: those.
            folder: of the run, for the stacks of a rank that hangs; None: there is none.
            events: the record, for the ranks that are slow.
        """
        self._folder, self._events = folder, events
        members = {name: ranks for name, (ranks, _) in groups.items()}
        self._store.set(f"groups/{self._rank}", json.dumps(members))
        self._groups = groups

    def explain(self, why: str, *, again: bool = False) -> bool:
        """Print who keeps whom waiting; if another rank does, stay until it has.

        Args:
            why: a sentence about this rank.
            again: make sure that nothing has moved since this rank looked.

        Returns:
            Whether it is explained; not if something moves after all.
        """
        if self._store.add("explaining", 1) > 1:
            return self.stay_until_explained()
        before = read_states(self._store, self._size)
        time.sleep(self._silence_s)
        after = read_states(self._store, self._size)
        both = list(zip(before, after, strict=True))
        if again and any(old and new and old.doings() != new.doings() for old, new in both):
            self._store.set("explaining", "0")
            return False
        lost = [
            rank
            for rank, (old, new) in enumerate(both)
            if rank != self._rank
            and (new is None or (old is not None and old.beat == new.beat and not new.ended))
        ]
        found = explain(after, lost, self._activity.sends())
        told = f"megalite: {why}\n{found.text()}"
        if self._folder is not None:
            told += f"\nstacks of the ranks: {self._folder / STACKS}"
        print(told, file=sys.stderr, flush=True)
        self._store.set("explained", "")
        self._linger()
        return True

    def stay_until_explained(self) -> bool:
        """Go on speaking while another rank explains: whoever leaves now is taken for dead, and the
        first to leave may have all others stopped. Returns whether it has explained."""
        for _ in range(int(3 * self._silence_s / self._interval_s)):
            if self._store.check(["explained"]):
                self._linger()
                return True
            if self._store.add("explaining", 0) == 0:
                return False
            self._publish()
            time.sleep(self._interval_s)
        return True

    def is_terminated(self) -> bool:
        """Whether somebody is ending the ranks: SIGTERM came, and one of them has gone."""
        if not self._stop.is_terminated() or self._activity.phase == "the end":
            return False
        states = read_states(self._store, self._size)
        return any(state and (state.ended or not self._speaks(state)) for state in states)

    def _dump_stacks(self) -> None:
        """Write where all threads of this rank are."""
        if self._folder is None:
            return
        with suppress(OSError):
            (self._folder / STACKS).mkdir(parents=True, exist_ok=True)
            with open(self._folder / STACKS / f"rank-{self._rank}.txt", "w") as file:
                faulthandler.dump_traceback(file, all_threads=True)

    def _linger(self) -> None:
        """Stay until all know of the explanation, and let nothing be printed after it."""
        self._dump_stacks()
        silence()
        wait_s = 3 * self._interval_s
        time.sleep(max(LINGER_S, 2 * wait_s) if self._rank == 0 else wait_s)

    def _run(self) -> None:
        try:
            self._publish()
            before = time.monotonic()
            while not self._ended.wait(self._interval_s):
                now = time.monotonic()
                if now - before > SUSPENDED_S:
                    self._activity.since += now - before
                    self._changed = now
                before = now
                self._publish()
                if self._store.check(["explained"]):
                    # All end, also those whose own limit is not reached.
                    self._linger()
                    os._exit(ExitCode.HUNG)
                if self.is_terminated():
                    os._exit(ExitCode.HUNG)
                if self._stop.by is None and self._store.check([STOP]):
                    self._stop.ask(signal.Signals[self._store.get(STOP).decode()])
                if self._rank == 0 and self._beat % EVERY == 0:
                    self._name_stragglers()
                overdue_s = self._activity.overdue_s()
                if overdue_s > self._rank * TURN_S and self._nothing_moves():
                    self._give_up()
            self._publish(ended=True)
        except dist.DistError:
            # Nobody takes the GPU's marks away any more.
            self._activity.progress = None
            if not self._ended.is_set() and self._activity.phase != "the end":
                print(
                    f"megalite: rank {self._rank} has lost the store in which ranks say what they "
                    "do; a hang would not be explained",
                    file=sys.stderr,
                    flush=True,
                )

    def _publish(self, *, ended: bool = False) -> None:
        with self._speaking:
            self._store.set(f"state/{self._rank}", json.dumps(self._state(ended).to_json()))

    def _state(self, ended: bool) -> State:
        self._beat += 1
        activity, now = self._activity, time.monotonic()
        doing, gpu = str(activity.doing), activity.device()
        # A host runs ahead of its GPU: what the GPU is in counts.
        place = activity if gpu is None else gpu
        calls = [(trace.called, trace.waiting) for _, trace in self._groups.values()]
        if activity.is_later_step:
            waits = place.peer >= 0 or any(waiting for _, waiting in calls)
            activity.samples.add(doing if gpu is None else str(gpu.doing), waits=waits)
        said = (activity.phase, doing, place.phase, place.position, *calls)
        if said != self._said:
            self._said, self._changed = said, now
        return State(
            rank=self._rank,
            beat=self._beat,
            phase=activity.phase,
            phases=activity.phases,
            doing=doing,
            phase_s=now - activity.since,
            still_s=now - self._changed,
            device="" if gpu is None else ", ".join(filter(None, (gpu.phase, str(gpu.doing)))),
            awaits=place.awaits,
            peer=place.peer,
            position=place.position,
            position_phase=place.phase,
            calls={
                name: Calls((), trace.called, trace.waiting, trace.names())
                for name, (_, trace) in self._groups.items()
            },
            patient=activity.patient,
            heeds=self._stop.is_heeded,
            shares=activity.samples.lately(),
            host=self._host,
            ended=ended,
        )

    def _name_stragglers(self) -> None:
        states = read_states(self._store, self._size)
        found = self._stragglers.compare(states)
        for straggler in found:
            print(f"megalite: {straggler}", file=sys.stderr, flush=True)
            self._events.write("slow", **asdict(straggler))
        if found:
            shares = {f"{s.rank} on {s.host}": s.shares for s in states if s is not None}
            told = table(shares, self._activity.step_s)
            print(f"of a step [ms], lately:\n{told}", file=sys.stderr, flush=True)

    def _nothing_moves(self) -> bool:
        """Whether no rank has anything that takes as long as it takes, or has changed lately.

        If another rank has found that already, it is taken at its word.
        """
        if self._store.add("explaining", 0):
            return True
        still_s = min(STILL_S, self._activity.limit_s() / 2)
        return not any(
            state.patient or (state.still_s < still_s and not state.ended)
            for state in read_states(self._store, self._size)
            if state is not None and self._speaks(state)
        )

    def _speaks(self, state: State) -> bool:
        """Whether a rank has said anything lately, as far as this rank has listened."""
        now = time.monotonic()
        beat, since = self._heard.get(state.rank, (-1, now))
        if beat != state.beat:
            since = now
        self._heard[state.rank] = (state.beat, since)
        return now - since < self._silence_s

    def _give_up(self) -> None:
        activity = self._activity
        seconds = time.monotonic() - activity.since
        ends = True
        try:
            ends = self.explain(
                f"nothing moves: rank {self._rank} has been in {activity.phase} for {seconds:.0f} "
                f"s, more than the {activity.limit_s():.0f} s that it may take "
                f"({activity.limit_flag()})",
                again=True,
            )
        finally:
            # Also without the store: it went with a rank that has ended.
            if ends:
                os._exit(ExitCode.HUNG)


def silence() -> None:
    """Let this process print no more: NCCL has a page to say about each peer that leaves."""
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def last_words(store: dist.Store, size: int) -> str:
    """The table of what each rank last said, for a launcher whose ranks are gone."""
    return "\n".join(f"  {line}" for line in explain(read_states(store, size), (), {}).table)


def stops_at_once(store: dist.Store) -> bool:
    """Whether the launcher ends all ranks, and says so itself."""
    try:
        return bool(store.check([AT_ONCE]))
    except dist.DistError:
        return True  # it has gone


def steps_begun(store: dist.Store, size: int) -> int:
    """The last step that a rank said it was in; 0: none."""
    phases = [state.phase for state in read_states(store, size) if state is not None]
    return max((int(m[1]) for m in (re.match(r"step (\d+)$", p) for p in phases) if m), default=0)


def read_states(store: dist.Store, size: int) -> Sequence[State | None]:
    """What each rank said last; None of those that never said anything."""
    states, groups = (_read(store, kind, size) for kind in ("state", "groups"))
    found: list[State | None] = []
    for said, members in zip(states, groups, strict=True):
        if said is None:
            found.append(None)
            continue
        values = json.loads(said)
        for name, ranks in json.loads(members or b"{}").items():
            if name in values["calls"]:
                values["calls"][name]["ranks"] = ranks
        found.append(State.from_json(values))
    return found


def _read(store: dist.Store, kind: str, size: int) -> list[bytes | None]:
    """The values of all ranks: at once if all are there, which a large world needs."""
    keys = [f"{kind}/{rank}" for rank in range(size)]
    if store.check(keys):
        return list(store.multi_get(keys))
    return [store.get(key) if store.check([key]) else None for key in keys]
