"""The launcher's two duties while ranks run: to start them again, and to pass on a wish to stop."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

import torch.distributed as dist

from megalite.events import Events
from megalite.exit_codes import RETRIED, ExitCode
from megalite.parallel.failures import Ending
from megalite.parallel.stop import StopRequest, heed
from megalite.parallel.watchdog import AT_ONCE, STOP, read_states


class Asking:
    """A launcher's wish that its ranks stop after the step under way, if it was asked to.

    Args:
        size: ranks.
    """

    def __init__(self, size: int):
        self._size, self._request = size, StopRequest()
        self._board: dist.Store | None = None

    @property
    def is_asked(self) -> bool:
        """Whether somebody wishes it."""
        return self._request.by is not None

    @contextmanager
    def over(self, board: dist.Store) -> Iterator[None]:
        """Pass it on to the ranks that speak on this board."""
        self._board = board
        try:
            yield
        finally:
            self._board = None

    def ask(self, by: signal.Signals) -> bool:
        """Answer a signal; returns False if all ranks have to be stopped at once: none of them
        would heed it yet, or it is not the first one."""
        is_heeded = self._pass_on(by)
        if not is_heeded and self._board is not None:
            # One that has begun to listen since would stop in order, and say so.
            self._board.set(AT_ONCE, by.name)
        return is_heeded

    def _pass_on(self, by: signal.Signals) -> bool:
        """See `ask`."""
        if not self.is_asked:
            board = self._board
            states = [] if board is None else read_states(board, self._size)
            if board is None or not all(state is not None and state.heeds for state in states):
                return False
            board.set(STOP, by.name)
            print(
                f"megalite: {by.name}: stopping after the step under way; again to stop at once",
                file=sys.stderr,
                flush=True,
            )
        return self._request.ask(by)


def supervise(
    start: Callable[[int, Asking], Ending], max_restarts: int, size: int, events: Events
) -> int:
    """Start the ranks until they are done, or have failed once more than they may.

    What would fail again, and a wish to stop, end the run at once.

    Args:
        start: starts them and waits for them; its arguments are how often they have been started
            before, and what they may be asked.
        max_restarts: how often they are started again.
        size: how many they are.
        events: the record.

    Returns:
        Exit code.
    """
    asking = Asking(size)
    with heed(asking.ask):
        for attempt in count():
            ending = start(attempt, asking)
            if ending.code not in RETRIED or attempt == max_restarts or asking.is_asked:
                break
            seconds = time.time() - ending.at
            print(
                f"megalite: starting all ranks again after {ending.why} (restart {attempt + 1} of "
                f"{max_restarts}, {seconds:.1f} s after the failure was noticed)",
                file=sys.stderr,
                flush=True,
            )
            _record(events, "restart", attempt, ending)
    if ending.code not in (ExitCode.DONE, ExitCode.STOPPED):
        _record(events, "stop", attempt, ending)
    return ending.code


def _record(events: Events, event: str, attempt: int, ending: Ending) -> None:
    events.write(event, attempt=attempt, why=ending.why, code=ending.code, step=ending.step)
