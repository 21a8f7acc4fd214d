"""The folder where tokenized corpora and indices are kept, and locks in it. No torch import."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megalite.config_data import DataConfig
from megalite.errors import DataError


def cache_folder(data: DataConfig) -> Path:
    """The folder of `--data-cache-path`, or the user's own; it is made if there is none.

    Raises:
        DataError: it cannot be made.
    """
    if data.data_cache_path:
        folder = Path(data.data_cache_path)
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = Path(base) / "megalite"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot make the cache folder {folder}: {error.strerror}; "
            "give another one with --data-cache-path"
        ) from None
    return folder


@contextmanager
def locked(prefix: Path) -> Iterator[None]:
    """Hold an exclusive lock beside the prefix; it goes with the process.

    Raises:
        DataError: the folder cannot be written.
    """
    try:
        lock = open(f"{prefix}.lock", "w")
    except OSError as error:
        raise DataError(
            f"the cache folder {prefix.parent} cannot be written: {error.strerror}; "
            "give another one with --data-cache-path"
        ) from None
    with lock:
        # Some network file systems have no locks: then several processes may do the same work, and
        # the last to finish wins with the same files.
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
