"""Texts of a corpus: of which files, and cut where."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from io import BufferedReader
from itertools import accumulate
from pathlib import Path

from megalite.data.source import Source
from megalite.errors import DataError
from megalite.reading.chunks import Bad, Place, chunks
from megalite.reading.inputs import Input, kind_of
from megalite.reading.records import sentences, texts
from megalite.wording import counted

STDLIB_CAP_BYTES = 16 << 20
STDLIB_LEAST_BYTES = 1 << 20
SEQUENCE_BYTES = range(256, 4096)
WANTED_SEQUENCES = 64
"""A text file is one document, cut into so many sequences, or more if they would be longer than
that; at line ends where there are any. So a split by sequences (Megatron's unit) can cut inside.
Other tokenizers than that of bytes see the text uncut, and their tokens are cut. That, and that any
bytes are a text, is why preprocessing's reading of text files does not serve here."""

PART_BYTES = 16 << 20
"""A longer text file is tokenized in parts, cut at a line end: the memory it takes has a bound."""

MOST_RECORD_BYTES = 1 << 30
"""Of a line of JSON, or of a row: a file without line ends is not read into memory whole."""

_KEYS = ("text",)
"""The field of a record that is read."""

_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}
    | {"_vendor", "_bundled", "lib-dynload"}
)


def source_files(source: Source) -> list[Input]:
    """What is read of a source: of the standard library as many files as its cap allows.

    Raises:
        DataError: it holds too little, or cannot be read.
    """
    if source.kind != "stdlib":
        return [_input(source.path)]
    files = [_input(path) for path in stdlib_files(source.path)]
    ends = list(accumulate(file.size for file in files))
    if not files or ends[-1] < STDLIB_LEAST_BYTES:
        raise DataError(
            f"this Python comes without the sources of its standard library ({source.path} holds "
            f"{len(files)} .py files), so there is no built-in corpus: give a text with --data"
        )
    return files[: bisect_right(ends, STDLIB_CAP_BYTES)]


def _input(path: Path) -> Input:
    try:
        stat = path.stat()
    except OSError as error:
        raise _unreadable(error) from None
    return Input(str(path), *kind_of(path.name), stat.st_size, stat.st_mtime_ns)


def stdlib_files(root: Path) -> list[Path]:
    """Python sources of the standard library without tests, vendored and installed packages.

    The order is by the hash of the path: fixed, and unrelated to the alphabet, so that the size cap
    and the held-out share are both a fair sample.
    """
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        paths = (Path(folder, name) for name in names if name.endswith(".py"))
        found += [path for path in paths if path.is_file()]  # not a link to nowhere
    key = {path: hashlib.sha256(path.relative_to(root).as_posix().encode()) for path in found}
    return sorted(found, key=lambda path: key[path].digest())


def sequences(
    source: Source, files: Sequence[Input], lengths: range | None
) -> Iterator[tuple[bytes, bool]]:
    """Text of each sequence, and whether it is the last of its document.

    Args:
        source: what to read.
        files: of the source.
        lengths: of the sequences of a text file [bytes]; None: parts as large as memory should
            hold.

    Raises:
        DataError: the source cannot be read.
    """
    if source.kind == "stdlib":
        found = _whole_files(files)
    elif source.kind == "records":
        found = _record_sequences(files)
    else:
        found = _text_sequences(files[0], lengths or range(PART_BYTES, PART_BYTES))
    while True:
        # Only reading is in here: what fails in writing is not the source's fault.
        try:
            item = next(found, None)
        except OSError as error:
            raise _unreadable(error) from None
        if item is None:
            return
        yield item


def _unreadable(error: OSError) -> DataError:
    return DataError(f"{error.filename} cannot be read: {error.strerror}")


def _whole_files(files: Sequence[Input]) -> Iterator[tuple[bytes, bool]]:
    for each in files:
        yield Path(each.path).read_bytes(), True


def _text_sequences(text: Input, lengths: range) -> Iterator[tuple[bytes, bool]]:
    with open(text.path, "rb") as file:
        size = max(lengths.start, min(lengths.stop, text.size // WANTED_SEQUENCES))
        current = _about(size, file)
        while current:
            following = _about(size, file)
            yield current, not following
            current = following


def _about(size: int, file: BufferedReader) -> bytes:
    """Lines of about so many bytes together, or a part of a long one, cut between two characters;
    empty at the end."""
    parts, total = [], 0
    while total < size and (line := file.readline(2 * size)):
        parts.append(line)
        total += len(line)
    while parts and b"\x80" <= file.peek(1)[:1] < b"\xc0":  # inside a character of UTF-8
        parts.append(file.read(1))
    return b"".join(parts)


def _record_sequences(files: Sequence[Input]) -> Iterator[tuple[bytes, bool]]:
    for chunk in chunks(files, _KEYS, "file", MOST_RECORD_BYTES, Place()):
        good, bad = texts(chunk, _KEYS, MOST_RECORD_BYTES)
        if bad:
            raise _unusable(bad, files)
        for (text,) in good:
            yield text.encode(), True


def _unusable(bad: Sequence[Bad], files: Sequence[Input]) -> DataError:
    """Names the first of the records of a chunk that cannot be used, and counts the others."""
    shown = sentences(bad, files)
    count = sum(each.count for each in bad)
    leave_out = "tools/preprocess_data.py leaves out what cannot be used"
    if sum(each.count for each in bad[: len(shown)]) == count:
        *others, last = shown
        return DataError([*others, f"{last}; {leave_out}"])
    first = "".join(f"\n    {each}" for each in shown)
    return DataError(
        f"{files[bad[0].input].path}: at least {counted(count, 'record')} cannot be used; "
        f"{leave_out}:{first}\n    ..."
    )
