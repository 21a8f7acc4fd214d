"""Telling of a failure once: by the rank that failed first, or by the launcher if it could not."""

from __future__ import annotations

import signal
import sys
import time
import traceback

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

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


def report_once(who: str, store: dist.Store | None, error: Exception) -> None:
    """Print the traceback of the rank that failed first, under its name."""
    if _is_lost_peer(error):
        # Not the cause: the peer reports itself, or the launcher names the signal it died of.
        time.sleep(LOST_PEER_PATIENCE_S)
    if claim_report(store):
        print(f"megalite: {who} failed:", file=sys.stderr)
        traceback.print_exception(error, file=sys.stderr)
        sys.stderr.flush()


def report_failure(error: ChildFailedError) -> int:
    """The launcher's part: what a rank that ended could not say itself.

    Returns:
        Exit code of the whole run: 2 for bad input, else 1.
    """
    rank, failure = min(error.failures.items())
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        print(f"megalite: rank {rank} was killed by {name}; all are stopped", file=sys.stderr)
    elif failure.exitcode not in (1, 2):
        print(f"megalite: rank {rank} ended with exit code {failure.exitcode}", file=sys.stderr)
    return 2 if failure.exitcode == 2 else 1


def _is_lost_peer(error: Exception) -> bool:
    words = ("closed by peer", "reset by peer", "Broken pipe", "Connection refused")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
