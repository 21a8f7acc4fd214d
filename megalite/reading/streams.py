"""Bytes of an input, unpacked, in bounded memory; damage is named by what it is."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from typing import BinaryIO, Protocol

from megalite.reading.inputs import STANDARD_INPUT, Input

_FEED_BYTES = 1 << 10
"""Packed bytes that are unpacked at a time. Whatever they hold (at most some 32 MB with zstd, 1 MB
with gzip), a file made to explode cannot fill the memory. As fast as larger pieces (measured)."""


class DamagedError(Exception):
    """A packed file cannot be read further; the message says why."""


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


class ByteStream:
    """Reads an input front to back.

    Attributes:
        path: of the input.
        position: bytes of the file itself that have been read, packed or not.
        plain: what `read` returns stands so in a file that can be opened again.
    """

    def __init__(self, source: Input):
        standard = source.path == STANDARD_INPUT
        self._file: BinaryIO = sys.stdin.buffer if standard else open(source.path, "rb")
        self.path = source.path
        self._new = _decompressor(source.compression)
        self.plain = self._new is None and not standard and self._file.seekable()
        self._open: _Decompressor | None = None
        self._rest = bytearray()
        self._damage = ""
        self.position = 0

    def read(self, size: int) -> bytes:
        """So many bytes, fewer only at the end.

        Raises:
            DamagedError: what comes next cannot be unpacked; all before it has been returned.
            OSError: the file cannot be read.
        """
        if self._new is None:
            content = self._file.read(size)
            self.position += len(content)
            return content
        while len(self._rest) < size and not self._damage:
            piece = self._file.read(_FEED_BYTES)
            self.position += len(piece)
            if piece:
                self._unpack(piece)
            elif self._open is not None:
                self._damage = "it ends in the middle: the file was cut short"
            else:
                break
        content = bytes(self._rest[:size])
        del self._rest[:size]
        if not content and self._damage:
            raise DamagedError(self._damage)
        return content

    def skip(self, size: int) -> None:
        """Pass over bytes that an earlier run has read."""
        if self._new is None and size:
            self.position = self._file.seek(size)
            return
        while size:
            size -= len(self.read(min(size, 1 << 20))) or size

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _unpack(self, piece: bytes) -> None:
        """Unpack a piece; it may end one member of the file and begin the next."""
        assert self._new is not None
        while piece:
            if self._open is None:
                piece = piece.lstrip(b"\0")  # padding, as of tapes
                if not piece:
                    return
                self._open = self._new()
            try:
                self._rest += self._open.decompress(piece)
            except Exception as error:  # zlib.error or zstandard.ZstdError
                self._damage = str(error)
                return
            piece = self._open.unused_data
            if self._open.eof:
                self._open = None


def _decompressor(compression: str) -> Callable[[], _Decompressor] | None:
    if compression == "gzip":
        return lambda: zlib.decompressobj(31)  # 31: with gzip's header and checksum
    if compression == "zstd":
        import zstandard

        return lambda: zstandard.ZstdDecompressor().decompressobj()
    return None
