"""A thread beside each rank that says what the rank is doing, and explains when nothing moves.

Every rank publishes its `State` five times a second to a store that all can read. When a rank has
been in one phase for longer than it may and nothing moves on any rank, or when it has lost a peer,
one rank reads all states, prints who keeps whom waiting (`megalite.parallel.hang`), and all end.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence

import torch.distributed as dist

from megalite.parallel.activity import Activity, CallTrace
from megalite.parallel.hang import Calls, Explanation, State, explain

EXIT_CODE = 5
"""Of a run that hung or lost a rank."""

INTERVAL_S = 0.2
STILL_S = 60.0
"""A rank in which something changed since then moves, slow as it may be [s]."""

SILENCE_S = 3.0
"""A rank that says nothing new for so long is taken for dead or stopped."""

Groups = dict[str, tuple[tuple[int, ...], CallTrace]]
"""World ranks and calls of each group of a rank."""


class Watchdog:
    """One rank's thread.

    Args:
        store: a connection of its own: the rank's thread may be waiting in another.
        rank, size: of the world.
        activity: of this rank.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, activity: Activity):
        self._store, self._rank, self._size = store, rank, size
        self._activity = activity
        self._groups: Groups = {}
        self._beat = 0
        self._said: tuple = ()
        self._changed = time.monotonic()
        self._heard: dict[int, tuple[int, float]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watchdog")

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def watch(self, groups: Groups) -> None:
        """From now on say what this rank calls in its groups too."""
        self._groups = groups

    def explain(self, why: str) -> None:
        """Print who keeps whom waiting; if another rank does, stay until it has.

        Args:
            why: a sentence about this rank.
        """
        if self._store.add("explaining", 1) > 1:
            self.stay_until_explained()
            return
        found = self._read()
        print(f"megalite: {why}\n{found.text()}", file=sys.stderr, flush=True)
        self._store.set("explained", "")

    def stay_until_explained(self) -> None:
        """Go on speaking while another rank explains: whoever leaves now is taken for dead, and the
        first to leave may have all others stopped."""
        for _ in range(int(3 * SILENCE_S / INTERVAL_S)):
            if self._store.check(["explained"]):
                return
            self._publish()
            time.sleep(INTERVAL_S)

    def _read(self) -> Explanation:
        """What all ranks say, and who of them has stopped saying anything."""
        before = _states(self._store, self._size)
        time.sleep(SILENCE_S)
        after = _states(self._store, self._size)
        lost = [
            rank
            for rank, (old, new) in enumerate(zip(before, after, strict=True))
            if rank != self._rank
            and (new is None or (old is not None and old.beat == new.beat and not new.ended))
        ]
        return explain(after, lost, self._activity.sends())

    def _run(self) -> None:
        try:
            self._publish()
            while not self._ended.wait(INTERVAL_S):
                self._publish()
                if self._activity.overdue() and self._nothing_moves():
                    self._give_up()
            self._publish(ended=True)
        except dist.DistError:
            # Whoever keeps the store is gone; what this rank waits for will tell it.
            return

    def _publish(self, *, ended: bool = False) -> None:
        self._beat += 1
        activity, now = self._activity, time.monotonic()
        doing, gpu = str(activity.doing), activity.device()
        # A host runs ahead of its GPU: what the GPU is in counts.
        place = activity if gpu is None else gpu
        calls = [(trace.called, trace.waiting) for _, trace in self._groups.values()]
        said = (activity.phase, doing, place.phase, place.position, *calls)
        if said != self._said:
            self._said, self._changed = said, now
        state = State(
            rank=self._rank,
            beat=self._beat,
            phase=activity.phase,
            doing=doing,
            phase_s=now - activity.since,
            still_s=now - self._changed,
            device="" if gpu is None else ", ".join(filter(None, (gpu.phase, str(gpu.doing)))),
            awaits=place.awaits,
            peer=place.peer,
            position=place.position,
            position_phase=place.phase,
            calls={
                name: Calls(ranks, trace.called, trace.waiting, trace.names())
                for name, (ranks, trace) in self._groups.items()
            },
            patient=activity.patient,
            ended=ended,
        )
        self._store.set(f"state/{self._rank}", json.dumps(state.to_json()))

    def _nothing_moves(self) -> bool:
        """Whether no rank has anything that takes as long as it takes, or has changed lately."""
        still_s = min(STILL_S, self._activity.limit_s() / 2)
        return not any(
            state.patient or (state.still_s < still_s and not state.ended)
            for state in _states(self._store, self._size)
            if state is not None and self._speaks(state)
        )

    def _speaks(self, state: State) -> bool:
        """Whether a rank has said anything lately, as far as this rank has listened."""
        now = time.monotonic()
        beat, since = self._heard.get(state.rank, (-1, now))
        if beat != state.beat:
            since = now
        self._heard[state.rank] = (state.beat, since)
        return now - since < SILENCE_S

    def _give_up(self) -> None:
        activity = self._activity
        seconds = time.monotonic() - activity.since
        self.explain(
            f"nothing moves: rank {self._rank} has been in {activity.phase} for {seconds:.0f} s, "
            f"more than the {activity.limit_s():.0f} s that it may take ({activity.limit_flag()})"
        )
        os._exit(EXIT_CODE)


def last_words(store: dist.Store, size: int) -> str:
    """The table of what each rank last said, for a launcher whose ranks are gone."""
    return "\n".join(f"  {line}" for line in explain(_states(store, size), (), {}).table)


def _states(store: dist.Store, size: int) -> Sequence[State | None]:
    found: list[State | None] = []
    for rank in range(size):
        key = f"state/{rank}"
        there = store.check([key])
        found.append(State.from_json(json.loads(store.get(key))) if there else None)
    return found
