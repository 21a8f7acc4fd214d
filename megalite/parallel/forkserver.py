"""The server that ranks are forked from: it has imported torch once for all of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

from megalite.parallel.stop import STOPS

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
    # The server would answer Ctrl-C with a traceback of its imports, and its end would look like a
    # failure here; it ends with this process. It inherits the mask, and so do the ranks; here the
    # signals only wait. The tracker comes first: starting it takes them out of the mask.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
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
    for server in _servers() if sys.platform == "linux" else ():
        with suppress(ProcessLookupError, ChildProcessError):
            # Once it has stopped it forks no more; `multiprocessing` still wants its exit status.
            os.kill(server, signal.SIGSTOP)
            os.waitid(os.P_PID, server, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            for rank in _children(server):
                with suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGKILL)
            os.kill(server, signal.SIGKILL)
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
