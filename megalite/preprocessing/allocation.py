"""How a process of preprocessing holds memory."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""glibc's numbers of what `mallopt` sets."""


def keep_freed_memory() -> None:
    """Have the C library keep up to 64 MB of what is freed, where it is glibc; for a process alone.

    Chunks come and go in blocks of a megabyte. Each that is handed back to the system is zeroed,
    page by page, when the next one needs it: 2% of all work with tiktoken. And each thread that has
    a heap of its own leaves free places between blocks of its own, that no other thread fills.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, 64 << 20)
        mallopt(_MMAP_THRESHOLD, 4 << 20)
        mallopt(_ARENA_MAX, 1)
