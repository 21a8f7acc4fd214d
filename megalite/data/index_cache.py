"""Arrays that are built once per node and then mapped into memory by every process.

An entry is a folder `<kind>-<key>`: one `.npy` file for each array, readable by any numpy, and
`entry.json` with their checksums, sizes and times of change, and the facts they were built from.
The key is a hash of those facts, which name the data by its content: a corpus that was rewritten
under its old name has another key. An entry appears under its name when it is complete, by
renaming; one that is damaged, cut short or too short is built anew. Nothing in it is ever
unpickled.

While a file has the size and the time of change that it was written with it is not read through: a
node has many processes, and an index may have gigabytes. Else, as in a copy of the folder, its
checksum decides. So damage that leaves size and time as they were goes unseen.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from megalite.data.cache import locked
from megalite.errors import DataError

FORMAT = 1
"""Part of every key: raised when the same facts would give other arrays."""

Arrays = Mapping[str, np.ndarray]
_CHECKED_BYTES = 1 << 24


class IndexCache:
    """Entries in one folder.

    Args:
        folder: exists.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def get(
        self,
        kind: str,
        facts: Mapping[str, Any],
        build: Callable[[Arrays], Arrays],
        rows: int = 0,
    ) -> Arrays:
        """The arrays of an entry, read-only memory maps; builds them if they are not there.

        Args:
            kind: what they are, as part of a file name.
            facts: all that they follow from: plain values, equal after JSON.
            build: makes them, given those of an entry with fewer rows (or none).
            rows: that each array needs at least; 0: as many as `build` makes.

        Raises:
            DataError: the folder cannot be written.
        """
        text = json.dumps({"format": FORMAT, "kind": kind, **facts}, sort_keys=True)
        path = self.folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        found = _read(path)
        if found is None or _rows(found) < rows:
            with locked(path):
                found = _read(path)
                if found is None or _rows(found) < rows:
                    self._write(path, build(found or {}), text)
                    found = _read(path)
        if found is None:
            raise DataError(
                f"{path} cannot be read back as it was written: give another folder with "
                "--data-cache-path"
            )
        return found

    def _write(self, path: Path, arrays: Arrays, facts: str) -> None:
        # Containers that share a disk may share process numbers.
        temporary = Path(f"{path}.tmp-{socket.gethostname()}-{os.getpid()}")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            files = {}
            for name, array in arrays.items():
                np.save(temporary / f"{name}.npy", array, allow_pickle=False)
                files[name] = {"crc32": _checksum(array), **_stamp(temporary / f"{name}.npy")}
            entry = json.dumps({"facts": json.loads(facts), "files": files}, indent=2)
            (temporary / "entry.json").write_text(entry, encoding="utf-8")
            _put(temporary, path)
        except OSError as error:
            why = error.strerror or error
            raise DataError(
                f"cannot write an index to the cache folder {self.folder}: {why}; "
                "give another folder with --data-cache-path"
            ) from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _put(temporary: Path, path: Path) -> None:
    """Give a complete folder its name; who maps the files of the one before keeps them."""
    old = Path(f"{temporary}-old")
    with suppress(FileNotFoundError):
        os.rename(path, old)
    try:
        os.rename(temporary, path)
    except OSError:
        # Where there are no locks another process may have put the same entry there just now.
        if not path.exists():
            raise
    shutil.rmtree(old, ignore_errors=True)


def _read(path: Path) -> Arrays | None:
    """The arrays, or None if the entry is missing, incomplete or damaged."""
    try:
        files = json.loads((path / "entry.json").read_text(encoding="utf-8"))["files"]
        arrays = {}
        for name, told in files.items():
            file = path / f"{name}.npy"
            array = np.load(file, mmap_mode="r", allow_pickle=False)
            is_as_written = told == {"crc32": told["crc32"], **_stamp(file)}
            if not is_as_written and _checksum(array) != told["crc32"]:
                return None
            # Indexing a plain array is several times faster than indexing its subclass.
            arrays[name] = np.asarray(array)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError):
        return None
    return arrays or None


def _stamp(file: Path) -> dict[str, int]:
    """What changes when a file is written to."""
    status = file.stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _rows(arrays: Arrays) -> int:
    return min(len(array) for array in arrays.values())


def _checksum(array: np.ndarray) -> int:
    """CRC-32 of the content."""
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    crc = 0
    for first in range(0, len(content), _CHECKED_BYTES):
        crc = zlib.crc32(content[first : first + _CHECKED_BYTES], crc)
    return crc
