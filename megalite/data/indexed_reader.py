"""Reads Megatron-LM's indexed datasets and checks every rule of the format at open.

`indexed_format` describes the files. Everything is checked by reading, never through a map: reading
a map of a file that has become shorter ends the process (SIGBUS).
"""

from __future__ import annotations

import os
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO

import numpy as np

from megalite.data.indexed_format import BLOCK, DTYPES, HEADER_BYTES, MAGIC, TOKEN_CODES
from megalite.errors import DataError


class IndexedReader:
    """Memory-maps an indexed dataset and checks at open that its two files fit each other.

    Attributes:
        dtype: of the tokens.
        num_tokens: sum(lengths).
        lengths: int32 [S], tokens of each sequence.
        pointers: int64 [S], where each sequence starts in `.bin` [bytes].
        documents: int64 [D], document i is the sequences `documents[i]:documents[i + 1]`.
        tokens: all tokens in order, a read-only memory map, shape [num_tokens]. Prefer `read`.

    Raises:
        DataError: any rule of the format is broken; names the file, what was expected and found.
    """

    def __init__(self, prefix: Path):
        self.index_path, self.bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        try:
            with _open_file(self.index_path) as index, _open_file(self.bin_path) as tokens:
                self._read_index(index)
                self._check_size(tokens)
                self.tokens = _map(tokens, self.dtype, self.num_tokens, 0)
                self._descriptor = os.dup(tokens.fileno())
        except OSError as error:
            raise DataError(f"{error.filename or prefix}: {error.strerror}") from None
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start:stop` of the whole dataset, a copy, shape [stop - start].

        It reads the file and not the map, so that a file that has been cut since it was opened is
        an error with a name. For 4096 tokens that takes 2 microseconds.

        Raises:
            DataError: the file has become shorter.
        """
        assert 0 <= start <= stop <= self.num_tokens, f"tokens {start} to {stop}"
        found = np.empty(stop - start, self.dtype)
        _read_into(self._descriptor, self.bin_path, found, start * self.dtype.itemsize)
        return found

    def __reduce__(self) -> tuple[type[IndexedReader], tuple[Path]]:
        """Another process opens the files anew: a map would be sent as all its bytes."""
        return IndexedReader, (self.index_path.with_suffix(""),)

    def _read_index(self, file: BinaryIO) -> None:
        path = self.index_path
        size = os.fstat(file.fileno()).st_size
        header = file.read(HEADER_BYTES)
        if header[:9] != MAGIC:
            raise DataError(f"{path}: not a Megatron index (starts with {header[:9]!r})")
        if len(header) < HEADER_BYTES:
            raise DataError(f"{path}: {HEADER_BYTES} bytes of header expected, found {size}")
        version, code, sequences, documents = struct.unpack("<QBQQ", header[9:])
        if version != 1:
            raise DataError(f"{path}: version 1 expected, found {version}")
        if code not in TOKEN_CODES:
            raise DataError(f"{path}: dtype code {code} is none of {TOKEN_CODES}")
        expected = HEADER_BYTES + 12 * sequences + 8 * documents
        if size != expected:
            raise DataError(
                f"{path}: {expected} bytes expected for {sequences} sequences and a document "
                f"array of {documents}, found {size}"
                + (", as an index of several modes has" if size == expected + sequences else "")
            )
        self.dtype = DTYPES[code]
        documents_start = HEADER_BYTES + 12 * sequences
        self.num_tokens = self._check_sequences(file, sequences)
        self._check_documents(file, documents_start, documents, sequences)
        self.lengths = _map(file, np.dtype("<i4"), sequences, HEADER_BYTES)
        pointers_start = HEADER_BYTES + 4 * sequences
        self.pointers = _map(file, np.dtype("<i8"), sequences, pointers_start)
        self.documents = _map(file, np.dtype("<i8"), documents, documents_start)

    def _check_size(self, file: BinaryIO) -> None:
        expected = self.num_tokens * self.dtype.itemsize
        size = os.fstat(file.fileno()).st_size
        if size != expected:
            raise DataError(
                f"{self.bin_path}: {expected} bytes expected by {self.index_path.name}, but it "
                f"has {size}"
            )

    def _check_sequences(self, file: BinaryIO, sequences: int) -> int:
        """Lengths are none below 0 and pointers follow from them; returns the number of tokens."""
        first = tokens = 0
        lengths = _blocks(file, "<i4", HEADER_BYTES, sequences)
        pointers = _blocks(file, "<i8", HEADER_BYTES + 4 * sequences, sequences)
        for length, pointer in zip(lengths, pointers, strict=True):
            if length.min() < 0:
                i = int(length.argmin())
                raise DataError(
                    f"{file.name}: sequence {first + i} has a negative length, {int(length[i])}"
                )
            ends = tokens + np.cumsum(length, dtype=np.int64)
            starts = (ends - length) * self.dtype.itemsize
            if (pointer != starts).any():
                i = int((pointer != starts).argmax())
                raise DataError(
                    f"{file.name}: sequence {first + i} should start at byte {int(starts[i])} of "
                    f"{self.bin_path.name}, the index says {int(pointer[i])}"
                )
            first, tokens = first + len(length), int(ends[-1])
        return tokens

    def _check_documents(self, file: BinaryIO, start: int, documents: int, sequences: int) -> None:
        """The document array runs from 0 to the number of sequences and never falls."""
        ends = [0, documents - 1] if documents else []
        found = [int(next(_blocks(file, "<i8", start + 8 * i, 1))[0]) for i in ends]
        if found != [0, sequences]:
            raise DataError(
                f"{file.name}: the document array must run from 0 to {sequences}, found "
                f"{found[:1]} to {found[1:]}"
            )
        first = before = 0
        for block in _blocks(file, "<i8", start, documents):
            falls = np.diff(block, prepend=before) < 0
            if falls.any():
                i = int(falls.argmax())
                raise DataError(
                    f"{file.name}: the document array must not fall, but goes from "
                    f"{int(block[i - 1]) if i else before} to {int(block[i])} at {first + i}"
                )
            first, before = first + len(block), int(block[-1])


def _open_file(path: Path) -> BinaryIO:
    """Open a regular file: a pipe would wait for a writer."""
    if not S_ISREG(path.stat().st_mode):
        raise DataError(f"{path}: not a regular file")
    return open(path, "rb")


def _map(file: BinaryIO, dtype: np.dtype[Any], count: int, offset: int) -> np.ndarray:
    """A read-only memory map of a part of a file; of nothing an empty array."""
    if not count:
        return np.empty(0, dtype)  # mmap refuses empty files
    try:
        return np.memmap(file, dtype, "r", offset, (count,))
    except ValueError:
        raise DataError(f"{file.name}: the file became shorter while it was opened") from None


def _blocks(file: BinaryIO, dtype: str, offset: int, count: int) -> Iterator[np.ndarray]:
    """`count` numbers from an offset [bytes] on, block by block."""
    for start in range(0, count, BLOCK):
        block = np.empty(min(BLOCK, count - start), dtype)
        _read_into(file.fileno(), Path(file.name), block, offset + start * block.itemsize)
        yield block


def _read_into(descriptor: int, name: Path, array: np.ndarray, offset: int) -> None:
    """Fill an array from an offset [bytes] on."""
    rest = array.data.cast("B") if len(array) else memoryview(b"")
    while rest:
        got = os.preadv(descriptor, [rest], offset)
        if not got:
            size = os.fstat(descriptor).st_size
            raise DataError(
                f"{name}: the file has become shorter since it was opened: byte {offset} is "
                f"wanted, but it ends at {size}"
            )
        offset += got
        rest = rest[got:]
