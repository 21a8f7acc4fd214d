"""What a program prints, when whoever read it may have gone: `| head`. No torch import."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import TextIO


def say(text: str, end: str = "\n") -> None:
    """Print a text of a run on stdout, now.

    A run goes on when nobody reads that any more, and says so once: its record is in files.
    """
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        _close(sys.stdout)
        try:
            word = "megalite: nobody reads what this run prints any more; it goes on"
            print(word, file=sys.stderr, flush=True)
        except BrokenPipeError:
            _close(sys.stderr)


def reader_gone() -> int:
    """Print no more, as there is nothing to do but to print; returns the exit code."""
    _close(sys.stdout)
    return 128 + signal.SIGPIPE


def _close(stream: TextIO) -> None:
    """Let what is printed there go nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
    with suppress(BrokenPipeError):
        stream.flush()  # what is left of the text that failed
