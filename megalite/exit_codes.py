"""How a run ended, for scripts and schedulers. No torch import.

A run that a signal stops at once ends with 128 + the signal's number.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the programs that start ranks."""

    DONE = 0
    BAD_INPUT = 2
    """Flags, files or devices: it would fail again."""
    DAMAGED = 3
    """Data, a checkpoint or a replica is not what it was: look at it first."""
    NOT_FINITE = 4
    """Too many steps in a row were not finite: going on alike would not help."""
    HUNG = 5
    """Nothing moved for longer than it may, or a rank was lost."""
    INTERNAL = 70
    """A rank raised, or was killed."""
    STOPPED = 75
    """Asked to stop before its last step, and did so in order: start it again."""


RETRIED = frozenset({1, ExitCode.HUNG, ExitCode.INTERNAL})
"""After these --max-restarts starts all ranks again; 1 is Python's own."""
