"""Megatron-LM's indexed dataset, `PREFIX.bin` and `PREFIX.idx`: reader and writer.

`.bin` holds the tokens of all sequences, one after the other, with no header. `.idx` holds

    offset  bytes  content
         0      9  b"MMIDIDX\\x00\\x00"
         9      8  version, <Q, 1
        17      1  code of the tokens' dtype, <B
        18      8  number of sequences S, <Q
        26      8  length of the document array D, <Q (number of documents + 1)
        34    4 S  sequence lengths, int32 [tokens]
             8 S  where each sequence starts in .bin, int64 [bytes]
             8 D  document array, int64: 0, then the number of sequences so far after each document

all little-endian. Source of the format: Megatron-LM, `megatron/core/datasets/indexed_dataset.py`.
"""

from __future__ import annotations

import os
import socket
import struct
from array import array
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np

from megalite.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER_BYTES = 34
DTYPES: Mapping[int, np.dtype[Any]] = MappingProxyType(
    {
        1: np.dtype("<u1"),
        2: np.dtype("<i1"),
        3: np.dtype("<i2"),
        4: np.dtype("<i4"),
        5: np.dtype("<i8"),
        6: np.dtype("<f8"),
        7: np.dtype("<f4"),
        8: np.dtype("<u2"),
    }
)
TOKEN_CODES = (1, 2, 3, 4, 5, 8)
"""dtype codes that can hold token ids; 6 and 7 are floats."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype Megatron-LM writes for a tokenizer of this size (before padding)."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class IndexedWriter:
    """Writes both files under temporary names and renames them when `close` completes.

    Only 4 bytes per sequence and 8 per document are held in memory.

    Args:
        prefix: path of the files without their suffix.
        dtype: of the tokens; see `token_dtype`.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any]):
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        # Containers that share a disk may share process numbers.
        self._temporary = Path(f"{prefix}.tmp-{socket.gethostname()}-{os.getpid()}")
        self._bin: BinaryIO = open(f"{self._temporary}.bin", "wb")
        self._lengths = array("i")
        self._documents = array("q", [0])

    def add_sequence(self, tokens: np.ndarray) -> None:
        """Append one sequence of token ids, shape [length], any integer dtype.

        Raises:
            DataError: an id that the writer's dtype cannot hold.
        """
        limits = np.iinfo(self.dtype)
        if len(tokens) and not (limits.min <= tokens.min() and tokens.max() <= limits.max):
            raise DataError(
                f"{self.prefix}.bin: token ids from {tokens.min()} to {tokens.max()} do not fit "
                f"into {self.dtype.name}, which holds {limits.min} to {limits.max}"
            )
        self._bin.write(np.ascontiguousarray(tokens, dtype=self.dtype).tobytes())
        self._lengths.append(len(tokens))

    def end_document(self) -> None:
        """The sequences added since the last call (possibly none) are one document."""
        self._documents.append(len(self._lengths))

    def close(self) -> None:
        """Write the index and give both files their names."""
        assert self._documents[-1] == len(self._lengths), "sequences after the last end_document"
        self._bin.close()
        lengths = np.asarray(self._lengths, dtype="<i4")
        ends = np.cumsum(lengths.astype("<i8") * self.dtype.itemsize)
        pointers = np.concatenate([np.zeros(1, "<i8"), ends])[: len(lengths)]
        code = next(code for code, dtype in DTYPES.items() if dtype == self.dtype)
        with open(f"{self._temporary}.idx", "wb") as index:
            index.write(MAGIC)
            index.write(struct.pack("<QBQQ", 1, code, len(lengths), len(self._documents)))
            index.write(lengths.tobytes())
            index.write(pointers.astype("<i8").tobytes())
            index.write(np.asarray(self._documents, dtype="<i8").tobytes())
        for suffix in (".bin", ".idx"):
            os.replace(f"{self._temporary}{suffix}", f"{self.prefix}{suffix}")

    def discard(self) -> None:
        """Remove the temporary files."""
        # On a full disk closing fails too: what was not written is not wanted any more.
        with suppress(OSError):
            self._bin.close()
        for suffix in (".bin", ".idx"):
            Path(f"{self._temporary}{suffix}").unlink(missing_ok=True)


class IndexedReader:
    """Memory-maps an indexed dataset and checks at open that its two files fit each other.

    Attributes:
        lengths: int32 [S], tokens of each sequence.
        pointers: int64 [S], where each sequence starts in `.bin` [bytes].
        documents: int64 [D], document i is the sequences `documents[i]:documents[i + 1]`.
        tokens: all tokens in order, a read-only memory map, shape [sum(lengths)].

    Raises:
        DataError: any rule of the format is broken; names the file, what was expected and found.
    """

    def __init__(self, prefix: Path):
        self.index_path, self.bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        try:
            self._read_index()
            size = self.bin_path.stat().st_size
        except OSError as error:
            raise DataError(f"{error.filename}: {error.strerror}") from None
        expected = int(self.lengths.sum(dtype=np.int64)) * self.dtype.itemsize
        if size != expected:
            raise DataError(
                f"{self.bin_path}: {expected} bytes expected by {self.index_path.name}, "
                f"but it has {size}"
            )
        # mmap refuses empty files.
        self.tokens = (
            np.memmap(self.bin_path, dtype=self.dtype, mode="r")
            if size
            else np.empty(0, self.dtype)
        )

    def _read_index(self) -> None:
        path = self.index_path
        size = path.stat().st_size
        with open(path, "rb") as file:
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
            )
        self.dtype = DTYPES[code]
        content = np.memmap(path, mode="r", dtype=np.uint8)
        pointers_start = HEADER_BYTES + 4 * sequences
        documents_start = pointers_start + 8 * sequences
        self.lengths = np.frombuffer(content, "<i4", sequences, HEADER_BYTES)
        self.pointers = np.frombuffer(content, "<i8", sequences, pointers_start)
        self.documents = np.frombuffer(content, "<i8", documents, documents_start)
        self._check_arrays()

    def _check_arrays(self) -> None:
        path, pointers = self.index_path, self.pointers
        if len(self.lengths) and int(self.lengths.min()) < 0:
            i = int(self.lengths.argmin())
            raise DataError(f"{path}: sequence {i} has a negative length, {int(self.lengths[i])}")
        ends = np.cumsum(self.lengths.astype(np.int64) * self.dtype.itemsize)
        starts = np.concatenate([np.zeros(1, np.int64), ends])[: len(self.lengths)]
        wrong = np.flatnonzero(pointers != starts)
        if len(wrong):
            i = int(wrong[0])
            raise DataError(
                f"{path}: sequence {i} should start at byte {int(starts[i])} of "
                f"{self.bin_path.name}, the index says {int(pointers[i])}"
            )
        documents = self.documents
        if not len(documents) or documents[0] != 0 or documents[-1] != len(self.lengths):
            raise DataError(
                f"{path}: the document array must run from 0 to {len(self.lengths)}, found "
                f"{documents[:1].tolist()} to {documents[-1:].tolist()}"
            )
        falls = np.flatnonzero(np.diff(documents) < 0)
        if len(falls):
            i = int(falls[0])
            raise DataError(
                f"{path}: the document array must not fall, but goes from {int(documents[i])} "
                f"to {int(documents[i + 1])} at {i + 1}"
            )
