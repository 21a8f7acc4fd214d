"""Texts of a corpus as token ids: of which files, and cut where."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType

import numpy as np

from megalite.data.source import Source
from megalite.errors import DataError
from megalite.reading.chunks import BOM, Bad, Chunk, Lines, Place, chunks
from megalite.reading.inputs import Input, kind_of
from megalite.reading.records import encoded, sentences
from megalite.tokenizer.base import Tokenizer
from megalite.tokenizer.byte import ByteTokenizer
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

WORD_BYTES = 1 << 8
"""A longer line is cut before white space, if some comes so soon: no word, or number, is cut."""

MOST_RECORD_BYTES = 1 << 30
"""Of a line of JSON, or of a row: a file without line ends is not read into memory whole."""

_KEYS = ("text",)
"""The field of a record that is read."""

_HINTS: Mapping[str, str] = MappingProxyType(
    {
        "records": "; tools/preprocess_data.py leaves out what cannot be used",
        "text": "; tools/preprocess_data.py --text-documents line leaves out such lines",
        "stdlib": "; give texts of token ids with --data",
    }
)
"""What helps where a record cannot be used, by the kind of the source."""

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


@dataclass(frozen=True)
class Part:
    """A part of a corpus.

    Attributes:
        tokens: its ids without the end of the document, any integer dtype, [tokens].
        text_bytes: of its text.
        ends_document: it is the last of its document.
    """

    tokens: np.ndarray
    text_bytes: int
    ends_document: bool


def parts(source: Source, files: Sequence[Input], tokenizer: Tokenizer) -> Iterator[Part]:
    """The source, a part after the other.

    A part is a document of its own, or, of a text file, as much as `SEQUENCE_BYTES` (that of the
    byte tokenizer) or `PART_BYTES` allow.

    Args:
        source: what to read.
        files: of the source.
        tokenizer: of the text.

    Raises:
        DataError: the source cannot be read, or a record in it has no tokens.
    """
    if source.kind == "stdlib":
        found = _whole_files(files, tokenizer)
    elif source.kind == "records":
        found = _records(files, tokenizer)
    else:
        found = _text_parts(files, tokenizer)
    while True:
        # Only reading is in here: what fails in writing is not the source's fault.
        try:
            item = next(found, None)
        except OSError as error:
            raise _unreadable(error) from None
        except _UnusableError as error:
            raise error.told(files, _HINTS[source.kind]) from None
        if item is None:
            return
        yield item


def _unreadable(error: OSError) -> DataError:
    return DataError(f"{error.filename} cannot be read: {error.strerror}")


class _UnusableError(Exception):
    """Records of a chunk cannot be used."""

    def __init__(self, bad: Sequence[Bad]):
        super().__init__()
        self._bad = bad

    def told(self, files: Sequence[Input], hint: str) -> DataError:
        """Names the first of them, and counts the others."""
        shown = sentences(self._bad, files)
        count = sum(each.count for each in self._bad)
        if sum(each.count for each in self._bad[: len(shown)]) == count:
            *others, last = shown
            return DataError([*others, last + hint])
        first = "".join(f"\n    {each}" for each in shown)
        return DataError(
            f"{files[self._bad[0].input].path}: at least {counted(count, 'record')} cannot be used"
            f"{hint}:{first}\n    ..."
        )


def _whole_files(files: Sequence[Input], tokenizer: Tokenizer) -> Iterator[Part]:
    for number, each in enumerate(files):
        text = Path(each.path).read_bytes().removeprefix(BOM)
        yield Part(_tokens(Lines(number, 1, text, "line"), tokenizer), len(text), True)


def _text_parts(files: Sequence[Input], tokenizer: Tokenizer) -> Iterator[Part]:
    (text,) = files
    is_bytes = isinstance(tokenizer, ByteTokenizer)
    # Bytes are cut into sequences here: any place is between two tokens.
    lengths, reach = (
        (SEQUENCE_BYTES, 0) if is_bytes else (range(PART_BYTES, PART_BYTES), WORD_BYTES)
    )
    line, first = 1, True
    # What the tokenizer puts around a text stands around all of it, not around each part.
    around = np.array(tokenizer.encode(""), np.int64)
    with open(text.path, "rb") as file:
        if file.peek(len(BOM)).startswith(BOM):
            file.seek(len(BOM))
        size = max(lengths.start, min(lengths.stop, text.size // WANTED_SEQUENCES))
        current = _about(size, file, reach)
        while current:
            following = _about(size, file, reach)
            tokens = _tokens(Lines(0, line, current, "line"), tokenizer)
            if around.size:
                tokens = _inside(tokens, around, first, not following)
            yield Part(tokens, len(current), not following)
            line += current.count(b"\n")
            current, first = following, False


def _inside(tokens: np.ndarray, around: np.ndarray, first: bool, last: bool) -> np.ndarray:
    """A part's tokens; without those that the tokenizer puts around a text, but at its ends."""
    own = np.flatnonzero(~np.isin(tokens, around))
    start = own[0] if len(own) and not first else 0
    stop = own[-1] + 1 if len(own) and not last else len(tokens)
    return tokens[start:stop]


def _about(size: int, file: BufferedReader, reach: int) -> bytes:
    """Lines of about so many bytes together, or a part of a long one, cut before white space that
    comes within `reach` bytes, or else between two characters; empty at the end."""
    parts, total = [], 0
    while total < size and (line := file.readline(2 * size)):
        parts.append(line)
        total += len(line)
    if parts and not parts[-1].endswith(b"\n"):
        parts += _rest_of_word(file, reach)
    while parts and b"\x80" <= file.peek(1)[:1] < b"\xc0":  # inside a character of UTF-8
        parts.append(file.read(1))
    return b"".join(parts)


def _rest_of_word(file: BufferedReader, reach: int) -> Iterator[bytes]:
    """Bytes before the next white space or the end, at most so many."""
    while reach and (following := file.peek(1)[:1]) and not following.isspace():
        yield file.read(1)
        reach -= 1


def _records(files: Sequence[Input], tokenizer: Tokenizer) -> Iterator[Part]:
    for chunk in chunks(files, _KEYS, "file", MOST_RECORD_BYTES, Place()):
        good, (rows,), bad = encoded(chunk, _KEYS, MOST_RECORD_BYTES, tokenizer)
        if bad:
            raise _UnusableError(bad)
        for (text,), tokens in zip(good, rows, strict=True):
            yield Part(tokens, len(text.encode()), True)


def _tokens(text: Lines, tokenizer: Tokenizer) -> np.ndarray:
    """Tokens of lines together, int [tokens]. Bytes that are not UTF-8 are tokens of bytes, and
    elsewhere U+FFFD."""
    if isinstance(tokenizer, ByteTokenizer):
        return np.frombuffer(text.content, np.uint8).astype(np.uint16)
    try:
        return tokenizer.encode_batch([text.content.decode("utf-8", "replace")])[0]
    except DataError:
        # Some line is none for this tokenizer; which one, each alone tells.
        alone = Chunk((text,), (), Place(), 0)
        raise _UnusableError(encoded(alone, _KEYS, MOST_RECORD_BYTES, tokenizer)[2]) from None
