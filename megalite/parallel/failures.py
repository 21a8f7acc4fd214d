"""Telling of a failure once: by the rank that failed first, or by the launcher if it could not."""

from __future__ import annotations

import re
import signal
import sys
import time
import traceback

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from megalite.parallel.watchdog import EXIT_CODE, Watchdog, last_words

LOST_PEER_PATIENCE_S = 5.0
"""How long a rank whose peer vanished waits to be stopped before it reports that itself."""


def claim_report(store: dist.Store | None) -> bool:
    """Whether this rank is the first to report a failure; so each is shown once.

    Args:
        store: the rendezvous store; None if there is none yet.
    """
    if store is None:
        return True
    try:
        return store.add("failures", 1) == 1
    except Exception:  # the rank that hosts the store is gone, so nobody else can report
        return True


def report_once(
    who: str, store: dist.Store | None, watchdog: Watchdog | None, error: Exception
) -> int:
    """Print the traceback of the rank that failed first, under its name.

    A rank that only lost its peers has not failed: it says who is missing.

    Returns:
        Exit code of this rank: `watchdog.EXIT_CODE` if a peer was missed, else 1.
    """
    if _is_lost_peer(error):
        # Not the cause: the peer reports itself, or the launcher names the signal it died of.
        time.sleep(LOST_PEER_PATIENCE_S)
        if watchdog is not None:
            _explain(who, store, watchdog)
            return EXIT_CODE
    if claim_report(store):
        print(f"megalite: {who} failed:", file=sys.stderr)
        traceback.print_exception(error, file=sys.stderr)
        sys.stderr.flush()
    return 1


def _explain(who: str, store: dist.Store | None, watchdog: Watchdog) -> None:
    """Say which peer is missing, or stay until another rank has."""
    try:
        if claim_report(store):
            watchdog.explain(f"{who} has lost a peer")
        else:
            watchdog.stay_until_explained()
    except dist.DistError:
        print(f"megalite: {who} has lost its peers, and the store with them", file=sys.stderr)


def report_failure(error: ChildFailedError, board: dist.Store, size: int) -> int:
    """The launcher's part: what a rank that ended could not say itself.

    Args:
        error: of torchelastic.
        board: where the ranks said what they were doing.
        size: of the world.

    Returns:
        Exit code of the whole run: 2 for bad input, `watchdog.EXIT_CODE` for a hang, else 1.
    """
    rank, failure = min(error.failures.items())
    told = (1, 2, EXIT_CODE)
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        print(f"megalite: rank {rank} was killed by {name}; all are stopped", file=sys.stderr)
    elif failure.exitcode not in told:
        print(f"megalite: rank {rank} ended with exit code {failure.exitcode}", file=sys.stderr)
    if failure.exitcode not in told:
        print(f"last heard of the ranks:\n{last_words(board, size)}", file=sys.stderr)
    return failure.exitcode if failure.exitcode in told else 1


def _is_lost_peer(error: Exception) -> bool:
    words = "closed by peer|reset by peer|Broken pipe|Connection refused|Timed out waiting"
    return isinstance(error, RuntimeError) and re.search(words, str(error)) is not None
