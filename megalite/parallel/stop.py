"""Signals that stop: at once, as an exception that cannot get lost, or in order. No torch import.

A run that is stepping takes the first one as a request: `StopRequest`. Until then, and after it, a
signal raises `Stop`. Python's own KeyboardInterrupt has two flaws here, both seen while torch was
importing:

- C code that has begun an import may swallow it: torch's does so with numpy's, and goes on with
  half of numpy; other code of torch's aborts the process.
- Raised inside `exec` of a text, as in `dataclass` and `namedtuple`, it makes `python -m` end by
  the signal, whatever exit code the program chose after it had caught it.
"""

from __future__ import annotations

import inspect
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

WAIT_S = 0.02
"""After so long a signal that waits for the end of an import or a `__del__` looks again."""

UNHEARD_S = 5.0
"""A `Stop` that has not come through until then was swallowed by something else: it comes again."""


AGAIN_S = 1.0
"""A signal that follows so soon on the first is the same one: a launcher passes on to its ranks
what a terminal or a scheduler has sent to every process already [s]."""


class Stop(KeyboardInterrupt):
    """A signal that ends this process.

    A class of its own: the interpreter ends by the signal after KeyboardInterrupt itself alone.

    Attributes:
        sigval: the signal, named as in torchelastic's SignalException.
    """

    def __init__(self, sigval: signal.Signals) -> None:
        super().__init__(sigval.name)
        self.sigval = sigval


class StopRequest:
    """Whether this rank was asked to stop after the step under way.

    Attributes:
        by: the signal that asked; None: nobody did.
        is_heeded: whether a step will see it.
        at_once: whether somebody ends all ranks, and says so, without waiting for that step.
    """

    def __init__(self) -> None:
        self.by: signal.Signals | None = None
        self.is_heeded = False
        self.at_once: Callable[[], bool] = lambda: False
        self._since = 0.0
        self._ears: tuple[socket.socket, socket.socket] | None = None
        self._terminated = False

    def ask(self, by: signal.Signals) -> bool:
        """Ask; returns False if somebody did `AGAIN_S` ago, and has lost patience."""
        now = time.monotonic()
        if self.by is None:
            self.by, self._since = by, now
        return now - self._since < AGAIN_S

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals as requests meanwhile, but for those that come again. In the main thread."""
        here, there = self._ears = socket.socketpair()
        here.setblocking(False)
        there.setblocking(False)
        before = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
        try:
            with heed(self.ask):
                self.is_heeded = True
                yield
        finally:
            self.is_heeded = False
            signal.set_wakeup_fd(before)
            self.is_terminated()
            self._ears = None
            here.close()
            there.close()

    def is_terminated(self) -> bool:
        """Whether SIGTERM came while this was listening, also if the main thread waits in C and has
        not taken it yet. From any thread."""
        ears = self._ears
        if ears is not None and not self._terminated:
            try:
                self._terminated = signal.SIGTERM in ears[0].recv(4096)
            except OSError:  # nothing came, or the main thread has closed it
                return False
        return self._terminated


@contextmanager
def heed(ask: Callable[[signal.Signals], bool]) -> Iterator[None]:
    """Let `ask` answer signals meanwhile; where it returns False they do what they did before.

    Not those that nohup or a shell has told us to ignore.
    """
    before = {stop: signal.getsignal(stop) for stop in STOPS}
    for stop, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(stop, partial(_ask, stop, ask, handler))
    try:
        yield
    finally:
        for stop, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(stop, handler)


def _ask(
    stop: signal.Signals,
    ask: Callable[[signal.Signals], bool],
    before: Callable[[int, FrameType | None], object] | int | None,
    number: int,
    frame: FrameType | None,
) -> None:
    """Handler of a signal that is heeded."""
    if ask(stop):
        return
    if callable(before):
        before(number, frame)
        return
    signal.signal(stop, signal.SIG_DFL)
    os.kill(os.getpid(), stop)


def raise_at(stops: tuple[signal.Signals, ...]) -> None:
    """Have signals raise `Stop` in the main thread, while the caller runs, but for those that
    nohup or a shell has told us to ignore. One that comes where it would get lost waits."""
    here = inspect.currentframe()
    caller = here.f_back if here else None
    for stop in stops:
        if signal.getsignal(stop) is not signal.SIG_IGN:
            signal.signal(stop, partial(_raise, stop, caller))


def ignore_stops() -> None:
    """From here on nothing is left to stop."""
    for number in (*STOPS, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)


def _raise(
    stop: signal.Signals, outermost: FrameType | None, _number: int, frame: FrameType | None
) -> None:
    """Handler of the signal, and of the alarm that repeats it."""
    waits = _would_lose(frame, outermost)
    signal.signal(signal.SIGALRM, partial(_raise, stop, outermost))
    # Again and again: a signal just before a system call is seen only when the call ends.
    pause_s = WAIT_S if waits else UNHEARD_S
    signal.setitimer(signal.ITIMER_REAL, pause_s, pause_s)
    if not waits:
        raise Stop(stop)


def _would_lose(frame: FrameType | None, outermost: FrameType | None) -> bool:
    """Whether an exception may get lost in the calls from `outermost`, not included, to `frame`."""
    while frame is not None and frame is not outermost:
        code = frame.f_code
        if code.co_filename == "<frozen importlib._bootstrap>" or code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False
