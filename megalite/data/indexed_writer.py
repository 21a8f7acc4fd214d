"""Writes Megatron-LM's indexed datasets in constant memory; for the files see `indexed_format`."""

from __future__ import annotations

import hashlib
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from megalite.data.indexed_format import BLOCK, DTYPES, MAGIC
from megalite.data.indexed_reader import IndexedReader
from megalite.errors import DataError


@dataclass(frozen=True)
class Written:
    """How far a writer has come.

    Attributes:
        tokens, sequences, documents: written so far.
        sha256: of the .bin so far.
    """

    tokens: int
    sequences: int
    documents: int
    sha256: str


@dataclass(frozen=True)
class FileSum:
    """A file's size and SHA-256."""

    bytes: int
    sha256: str


class IndexedWriter:
    """Writes both files under temporary names and renames them when `close` completes.

    Lengths and the document array wait in files of their own until their numbers are known.

    Args:
        prefix: path of the files without their suffix.
        dtype: of the tokens; see `token_dtype`.
        temporary: path of the temporary files without their suffix, on the same file system;
            default: beside the prefix, a name of this process alone.
        resume: go on behind this point of an earlier writer with the same `temporary`.

    Raises:
        DataError: what the earlier writer left is not what it had written.
        OSError: the files cannot be opened. Every other method may raise it too, on a full disk.
    """

    def __init__(
        self,
        prefix: Path,
        dtype: np.dtype[Any],
        temporary: Path | None = None,
        resume: Written | None = None,
    ):
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        # Containers that share a disk may share process numbers.
        own = f"{prefix}.tmp-{socket.gethostname()}-{os.getpid()}"
        self._temporary = own if temporary is None else str(temporary)
        self._sum = hashlib.sha256()
        at = resume or Written(0, 0, 0, self._sum.hexdigest())
        self._tokens, self._sequences, self._documents = at.tokens, at.sequences, at.documents
        self._open_sequences = 0  # since the last end of a document
        self._files: dict[str, BinaryIO] = {}
        try:
            self._open(at, "w+b" if resume is None else "r+b")
        except BaseException:
            self.release()
            if resume is None:
                self.discard()
            raise

    def _open(self, at: Written, mode: str) -> None:
        """Open the temporary files and go behind what they are to hold; drop the rest."""
        sizes = {
            "bin": at.tokens * self.dtype.itemsize,
            "lengths": 4 * at.sequences,
            "documents": 8 * at.documents,
        }
        for name, size in sizes.items():
            path = f"{self._temporary}.{name}"
            file = self._files[name] = cast("BinaryIO", open(path, mode))
            found = os.fstat(file.fileno()).st_size
            if found < size:
                raise DataError(f"{path}: {size} bytes were written before, found {found}")
            file.truncate(size)
        while block := self._files["bin"].read(BLOCK):
            self._sum.update(block)
        tokens = sum(int(block.sum(dtype=np.int64)) for block in self._blocks("lengths", "<i4"))
        last = [int(block[-1]) for block in self._blocks("documents", "<i8")][-1:]
        if (self._sum.hexdigest(), tokens) != (at.sha256, at.tokens) or last > [at.sequences]:
            raise DataError(f"{self._temporary}.*: not what was written before")

    def add_sequence(self, tokens: np.ndarray) -> None:
        """Append one sequence of token ids, shape [length], any integer dtype.

        Raises:
            DataError: an id that the writer's dtype cannot hold.
        """
        self._add(tokens, struct.pack("<i", len(tokens)), 1)

    def end_document(self) -> None:
        """The sequences added since the last call (possibly none) are one document."""
        self._files["documents"].write(struct.pack("<q", self._sequences))
        self._documents += 1
        self._open_sequences = 0

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray, sequences: np.ndarray) -> None:
        """Append whole documents at once.

        Args:
            tokens: of all their sequences, shape [sum(lengths)], any integer dtype.
            lengths: of each sequence, shape [S].
            sequences: how many of them each document has, shape [documents], sum S.

        Raises:
            DataError: an id that the writer's dtype cannot hold.
        """
        assert not self._open_sequences, "sequences after the last end_document"
        assert len(lengths) == sequences.sum() and len(tokens) == lengths.sum()
        ends = self._sequences + np.cumsum(sequences, dtype=np.int64)
        self._add(tokens, lengths.astype("<i4").tobytes(), len(lengths))
        self._end_documents(ends)

    def add_index(self, prefix: Path) -> None:
        """Append another dataset by copying its files block by block.

        Raises:
            DataError: it is damaged, or its tokens have another dtype.
        """
        assert not self._open_sequences, "sequences after the last end_document"
        reader = IndexedReader(prefix)
        if reader.dtype != self.dtype:
            raise DataError(
                f"{prefix}: tokens of dtype {reader.dtype.name} cannot follow those of "
                f"{self.dtype.name}"
            )
        offset = self._sequences
        for start in range(0, reader.num_tokens, BLOCK):
            block = reader.read(start, min(start + BLOCK, reader.num_tokens))
            self._write_tokens(block)
        self._tokens += reader.num_tokens
        for start in range(0, len(reader.lengths), BLOCK):
            self._files["lengths"].write(reader.lengths[start : start + BLOCK].tobytes())
        self._sequences += len(reader.lengths)
        for start in range(1, len(reader.documents), BLOCK):
            self._end_documents(offset + reader.documents[start : start + BLOCK])
        self._open_sequences = 0

    def flush(self) -> Written:
        """Hand everything to the operating system: it survives the end of the process."""
        assert not self._open_sequences, "sequences after the last end_document"
        for file in self._files.values():
            file.flush()
        return Written(self._tokens, self._sequences, self._documents, self._sum.hexdigest())

    def seal(self) -> Mapping[str, FileSum]:
        """Complete both files under their temporary names.

        Returns:
            Sizes and checksums of "bin" and "idx".
        """
        self.flush()
        size = self._files["bin"].tell()
        self._files["bin"].close()
        return {"bin": FileSum(size, self._sum.hexdigest()), "idx": self._write_index()}

    def close(self) -> Mapping[str, FileSum]:
        """Complete both files and give them their names.

        Returns:
            Sizes and checksums of "bin" and "idx".
        """
        sums = self.seal()
        for suffix in (".bin", ".idx"):
            os.replace(f"{self._temporary}{suffix}", f"{self.prefix}{suffix}")
        self.discard()
        return sums

    def discard(self) -> None:
        """Remove the temporary files."""
        self.release()
        for name in ("bin", "lengths", "documents", "idx"):
            Path(f"{self._temporary}.{name}").unlink(missing_ok=True)

    def release(self) -> None:
        """Close the temporary files and leave them for a writer that resumes."""
        # On a full disk closing fails too: what was not written is not wanted any more.
        for file in self._files.values():
            with suppress(OSError):
                file.close()

    def _add(self, tokens: np.ndarray, lengths: bytes, sequences: int) -> None:
        limits = np.iinfo(self.dtype)
        if len(tokens) and not (limits.min <= tokens.min() and tokens.max() <= limits.max):
            raise DataError(
                f"{self.prefix}.bin: token ids from {tokens.min()} to {tokens.max()} do not fit "
                f"into {self.dtype.name}, which holds {limits.min} to {limits.max}"
            )
        self._write_tokens(np.ascontiguousarray(tokens, dtype=self.dtype))
        self._files["lengths"].write(lengths)
        self._tokens += len(tokens)
        self._sequences += sequences
        self._open_sequences += sequences

    def _write_tokens(self, tokens: np.ndarray) -> None:
        content = tokens.data.cast("B") if len(tokens) else b""  # no copy
        self._files["bin"].write(content)
        self._sum.update(content)

    def _end_documents(self, ends: np.ndarray) -> None:
        self._files["documents"].write(ends.astype("<i8").tobytes())
        self._documents += len(ends)
        self._open_sequences = 0

    def _write_index(self) -> FileSum:
        code = next(code for code, dtype in DTYPES.items() if dtype == self.dtype)
        total = hashlib.sha256()
        with open(f"{self._temporary}.idx", "wb") as index:

            def write(content: bytes) -> None:
                index.write(content)
                total.update(content)

            write(MAGIC + struct.pack("<QBQQ", 1, code, self._sequences, self._documents + 1))
            for block in self._blocks("lengths", "<i4"):
                write(block.tobytes())
            for starts in _starts(self._blocks("lengths", "<i4"), self.dtype.itemsize):
                write(starts.astype("<i8").tobytes())
            write(struct.pack("<q", 0))
            for block in self._blocks("documents", "<i8"):
                write(block.tobytes())
            return FileSum(index.tell(), total.hexdigest())

    def _blocks(self, name: str, dtype: str) -> Iterator[np.ndarray]:
        file = self._files[name]
        file.seek(0)
        while block := file.read(BLOCK * np.dtype(dtype).itemsize):
            yield np.frombuffer(block, dtype)


def _starts(lengths: Iterator[np.ndarray], itemsize: int) -> Iterator[np.ndarray]:
    """Where sequences start [bytes], block by block, int64; after them, where the last one ends."""
    end = 0
    for block in lengths:
        ends = end + itemsize * np.cumsum(block, dtype=np.int64)
        yield np.concatenate([[end], ends[:-1]])
        end = int(ends[-1])
