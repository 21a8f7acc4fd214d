"""Telling of a failure once: by the rank that failed first, or by the launcher if it could not."""

from __future__ import annotations

import re
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from megalite.exit_codes import ExitCode
from megalite.parallel.watchdog import Watchdog, last_words, steps_begun

_TOLD: Mapping[int, str] = MappingProxyType(
    {
        1: "",
        ExitCode.BAD_INPUT: "bad input",
        ExitCode.DAMAGED: "something is damaged",
        ExitCode.NOT_FINITE: "steps that are not finite",
        ExitCode.HUNG: "a hang or a lost rank",
        ExitCode.INTERNAL: "",
        ExitCode.STOPPED: "asked to stop",
    }
)
"""Exit codes of ranks that have said themselves what is wrong, with words for it; 1 is a job's own,
or Python's."""

LOST_PEER_PATIENCE_S = 5.0
"""How long a rank whose peer vanished waits to be stopped before it reports that itself."""


@dataclass(frozen=True)
class Ending:
    """How one start of the ranks ended.

    Attributes:
        code: exit code of the whole run, if it is not started again.
        why: in words; empty if all is well.
        at: when the launcher noticed [s since 1970].
        step: steps that were done.
    """

    code: int
    why: str = ""
    at: float = 0.0
    step: int = 0


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
        Exit code of this rank: of a hang if a peer was missed, else of an internal error.
    """
    if _is_lost_peer(error):
        if watchdog is not None and watchdog.is_terminated():
            return ExitCode.HUNG  # whoever ends the ranks knows why
        # Not the cause: the peer reports itself, or the launcher names the signal it died of.
        time.sleep(LOST_PEER_PATIENCE_S)
        if watchdog is not None:
            _explain(who, store, watchdog)
            return ExitCode.HUNG
    if claim_report(store):
        print(f"megalite: {who} failed:", file=sys.stderr)
        traceback.print_exception(error, file=sys.stderr)
        sys.stderr.flush()
    return ExitCode.INTERNAL


def _explain(who: str, store: dist.Store | None, watchdog: Watchdog) -> None:
    """Say which peer is missing, or stay until another rank has."""
    try:
        if claim_report(store):
            watchdog.explain(f"{who} has lost a peer")
        else:
            watchdog.stay_until_explained()
    except dist.DistError:
        print(f"megalite: {who} has lost its peers, and the store with them", file=sys.stderr)


def report_failure(error: ChildFailedError, board: dist.Store, size: int) -> Ending:
    """The launcher's part: say what a rank that ended could not say itself.

    Args:
        error: of torchelastic.
        board: where the ranks said what they were doing.
        size: of the world.
    """
    rank, failure = min(error.failures.items())
    code = failure.exitcode
    if code in _TOLD:
        why = _TOLD[code] or f"rank {rank} failed"
    else:
        why = f"rank {rank} ended with exit code {code}"
        if code < 0:
            why = f"rank {rank} was killed by {signal.Signals(-code).name}"
        words = f"megalite: {why}; all are stopped"
        print(f"{words}\nlast heard of the ranks:\n{last_words(board, size)}", file=sys.stderr)
        code = ExitCode.INTERNAL
    step = max(0, steps_begun(board, size) - (code != ExitCode.STOPPED))
    return Ending(int(code), why, time.time(), step)


def _is_lost_peer(error: Exception) -> bool:
    words = "closed by peer|reset by peer|Broken pipe|Connection refused|Timed out waiting"
    return isinstance(error, RuntimeError) and re.search(words, str(error)) is not None
