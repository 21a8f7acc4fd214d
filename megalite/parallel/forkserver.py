"""The server that ranks are forked from: it has imported torch once for all of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path

ROUND_S = 0.05
QUIET_ROUNDS = 2
"""In one round a server has forked what it was asked for, or has buried what was killed."""

PATIENCE_S = 5.0

PRELOADED = (
    "megalite.trainer",
    "megalite.parallel.launch",
    "torch.fx.experimental.symbolic_shapes",  # torch imports it in the first backward
)


def start_method() -> str:
    """Start the server, where there is one; returns the name of the method for multiprocessing."""
    if sys.platform != "linux":
        return "spawn"
    multiprocessing.set_forkserver_preload([*PRELOADED])
    # The server would answer Ctrl-C with a traceback of its imports; it ends with this process.
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    forkserver.ensure_running()
    signal.signal(signal.SIGINT, previous)
    # Once a first process has run, the imports are done and the ranks start without a wait in which
    # one of them could be left half started.
    first = multiprocessing.get_context("forkserver").Process(target=_nothing)
    first.start()
    first.join()
    return "forkserver"


def kill_all() -> None:
    """Kill every process that this one has started, also one that is only being forked.

    That one is nobody's child yet as far as `multiprocessing` knows. Left alone it would find what
    it was to inherit gone, and say so.
    """
    quiet_rounds = 0 if sys.platform == "linux" else QUIET_ROUNDS
    until = time.monotonic() + PATIENCE_S
    while quiet_rounds < QUIET_ROUNDS and time.monotonic() < until:
        ranks = [rank for server in _servers() for rank in _children(server)]
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        quiet_rounds = 0 if ranks else quiet_rounds + 1
        time.sleep(ROUND_S)
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


def _nothing() -> None:
    """Body of the first process."""


def _servers() -> Iterator[int]:
    for child in _children(os.getpid()):
        with suppress(OSError):
            if b"multiprocessing.forkserver" in Path(f"/proc/{child}/cmdline").read_bytes():
                yield child


def _children(parent: int) -> list[int]:
    """Processes whose parent this is."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # "pid (name) state parent ..."; a name may hold brackets and blanks.
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
    return found
