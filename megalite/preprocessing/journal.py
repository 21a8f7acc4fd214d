"""The folder `PREFIX.partial` of a run that is not complete, and how far it has come.

Everything unfinished is in this folder. `journal` in it is replaced after every chunk, when
the chunk's output is with the operating system: whatever ends the process, the journal and what it
describes survive. That they survived a power failure too is checked by their checksums.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megalite.data.indexed_writer import Written
from megalite.errors import DataError
from megalite.preprocessing.settings import Settings
from megalite.reading.chunks import Bad, Place
from megalite.reading.inputs import Input


@dataclass(frozen=True)
class Counts:
    """What a dataset holds so far.

    Attributes:
        text_bytes: of all documents, as UTF-8.
        max_token: the largest id, -1 before the first.
    """

    text_bytes: int = 0
    max_token: int = -1


@dataclass(frozen=True)
class State:
    """How far a run has come.

    Attributes:
        identity: of settings, tokenizer and inputs: what the output depends on.
        place: where reading goes on.
        written, counts: by key.
        bad, bad_count: the first records left out, and the number of all.
        read_bytes: of the input files.
        sealed: all is written; only names are to be given.
    """

    identity: dict[str, str]
    place: Place
    written: tuple[Written | None, ...]
    counts: tuple[Counts, ...]
    bad: tuple[Bad, ...] = ()
    bad_count: int = 0
    read_bytes: int = 0
    sealed: bool = False


def identity(settings: Settings, fingerprint: str, inputs: Sequence[Input]) -> dict[str, str]:
    """What the output depends on, by the name it has for people."""
    digest = hashlib.sha256()
    for each in inputs:
        digest.update(f"{each.path}\0{each.kind}\0{each.size}\0{each.changed_ns}\n".encode())
    return {
        "the inputs (names, sizes or times of change)": digest.hexdigest(),
        "the tokenizer": fingerprint,
        "--json-keys": " ".join(settings.json_keys),
        "--append-eod": str(settings.append_eod),
        "--text-documents": settings.text_documents,
        "--max-document-mb": str(settings.longest_mb),
    }


class Journal:
    """Holds the folder of an unfinished run, alone.

    Args:
        output_prefix: of the run.
        resume: an earlier run's folder is expected; otherwise there must be none.

    Raises:
        DataError: there is one, or none, or another process has it.
    """

    def __init__(self, output_prefix: str, resume: bool):
        self.folder = Path(f"{output_prefix}.partial")
        self._path = self.folder / "journal"
        if not resume:
            self._create()
        try:
            self._lock = os.open(self.folder, os.O_RDONLY)
        except OSError as error:
            raise DataError(
                f"--resume: there is no interrupted run in {self.folder} ({error.strerror})"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise DataError(f"{self.folder}: another process is writing this dataset") from None
        except OSError:
            pass  # some network file systems have no locks

    def _create(self) -> None:
        try:
            self.folder.mkdir()
        except FileExistsError:
            raise DataError(
                f"{self.folder} holds what an interrupted run, or one that still runs, has "
                "written: continue it with --resume, or remove the folder"
            ) from None
        except OSError as error:
            raise DataError(f"{self.folder} cannot be made: {error.strerror}") from None

    def temporary(self, key: str) -> Path:
        """Path without suffix of the unfinished files of a key."""
        return self.folder / key

    def read(self, identity: dict[str, str]) -> State | None:
        """The state that was kept; None if the run was interrupted before its first.

        Raises:
            DataError: the run had other settings, or the journal is damaged.
        """
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            state = _state(kept)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, RecursionError, OSError) as error:
            raise DataError(
                f"{self._path} is damaged ({error}): remove the folder and start anew"
            ) from None
        other = [name for name, value in identity.items() if state.identity.get(name) != value]
        if other:
            raise DataError(
                f"--resume: the run in {self.folder} had other values of {' and of '.join(other)}"
            )
        return state

    @contextmanager
    def must_be_whole(self) -> Iterator[None]:
        """While the files are opened that a kept state describes: say what helps if they changed.

        Raises:
            DataError: one is missing, or not what it was.
        """
        remedy = f"remove {self.folder} and start anew, without --resume"
        try:
            yield
        except FileNotFoundError as error:
            raise DataError(f"{error.filename} is missing: {remedy}") from None
        except DataError as error:
            raise DataError([f"{each}: {remedy}" for each in error.violations]) from None

    def keep(self, state: State) -> None:
        """Replace what is kept."""
        fresh = self.folder / "journal.new"  # no key's file has this name
        fresh.write_text(json.dumps(asdict(state)), encoding="utf-8")
        os.replace(fresh, self._path)

    def release(self) -> None:
        """Let another process have the folder."""
        with suppress(OSError):
            os.close(self._lock)

    def remove(self) -> None:
        """Remove the folder and everything in it."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _state(kept: dict[str, Any]) -> State:
    return replace(
        State(**kept),
        place=Place(**kept["place"]),
        written=tuple(Written(**each) for each in kept["written"]),
        counts=tuple(Counts(**each) for each in kept["counts"]),
        bad=tuple(Bad(**each) for each in kept["bad"]),
    )
