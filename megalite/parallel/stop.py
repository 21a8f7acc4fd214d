"""SIGINT and SIGTERM as an exception that cannot get lost. No torch import.

Python's own KeyboardInterrupt has two flaws here, both seen while torch was importing:

- C code that has begun an import may swallow it: torch's does so with numpy's, and goes on with
  half of numpy; other code of torch's aborts the process.
- Raised inside `exec` of a text, as in `dataclass` and `namedtuple`, it makes `python -m` end by
  the signal, whatever exit code the program chose after it had caught it.
"""

from __future__ import annotations

import inspect
import signal
from functools import partial
from types import FrameType

STOPS = (signal.SIGINT, signal.SIGTERM)

WAIT_S = 0.02
"""After so long a signal that waits for the end of an import or a `__del__` looks again."""

UNHEARD_S = 5.0
"""A `Stop` that has not come through until then was swallowed by something else: it comes again."""


class Stop(KeyboardInterrupt):
    """A signal that ends this process.

    A class of its own: the interpreter ends by the signal after KeyboardInterrupt itself alone.

    Attributes:
        sigval: the signal, named as in torchelastic's SignalException.
    """

    def __init__(self, sigval: signal.Signals) -> None:
        super().__init__(sigval.name)
        self.sigval = sigval


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
