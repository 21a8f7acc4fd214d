"""The safetensors file of one rank: what its header says, and the digests of its pieces. No torch.

    8 bytes: length of the header, little-endian | header: JSON, blanks behind it | values

A *piece* is the header, or at most 64 MiB of one entry's values: what a digest is of, so that a
damaged byte is found without reading more, and told by the name of its tensor. A file's own digest
is that of its pieces' digests, one behind the other: pieces are hashed side by side.

Source of the format: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from megalite.errors import DamagedError

ITEM_BYTES: Mapping[str, int] = MappingProxyType(
    {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "U8": 1}
)
"""Of the types that are written here."""

PIECE_BYTES = 64 << 20
PAGE_BYTES = 4096
"""Values begin at a multiple of it."""
LONGEST_HEADER_BYTES = 100 << 20
"""Of safetensors' own reader."""


class Entry(NamedTuple):
    """One tensor of a file.

    Attributes:
        name, dtype, shape: as the file has it.
        at: byte of the file that its values begin with.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    at: int

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


class Piece(NamedTuple):
    """Bytes `[at, at + num_bytes)` of a file, of the tensor of this name; empty: of the header."""

    name: str
    at: int
    num_bytes: int


@dataclass(frozen=True)
class Layout:
    """What lies where in a file.

    Attributes:
        header: the first bytes, with their length.
        entries: in the order of the file, without gaps.
    """

    header: bytes
    entries: tuple[Entry, ...]

    @property
    def num_bytes(self) -> int:
        """Of the whole file."""
        return len(self.header) + sum(entry.num_bytes for entry in self.entries)

    def pieces(self) -> list[Piece]:
        """What each digest is of, in the order of the file."""
        found = [Piece("", 0, len(self.header))]
        for entry in self.entries:
            for begin in range(0, entry.num_bytes, PIECE_BYTES):
                length = min(PIECE_BYTES, entry.num_bytes - begin)
                found.append(Piece(entry.name, entry.at + begin, length))
        return found


def lay_out(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> Layout:
    """The layout of a file with these tensors: (name, dtype, shape).

    Wider types come first, so that every tensor is aligned to its own.
    """
    order = sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor[1]])
    said: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, dtype, shape in order:
        end = offset + prod(shape) * ITEM_BYTES[dtype]
        said[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE_BYTES)
    header = struct.pack("<Q", len(text)) + text
    entries, at = [], len(header)
    for name, dtype, shape in order:
        entries.append(Entry(name, dtype, shape, at))
        at += entries[-1].num_bytes
    return Layout(header, tuple(entries))


def read_layout(path: Path) -> Layout:
    """What a file's header says; nothing of its values is read.

    Raises:
        DamagedError: it is no safetensors file, or its size is not what the header says.
    """
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(LONGEST_HEADER_BYTES, size - 8):
                raise DamagedError(f"{path} is no safetensors file: its header has no right length")
            text = file.read(length)
    except OSError as error:
        raise DamagedError(f"{path} can't be read: {error.strerror}") from None
    entries = _entries(path, text, 8 + length)
    layout = Layout(prefix + text, entries)
    if layout.num_bytes != size:
        raise DamagedError(f"{path} has {size} bytes, and its header tells of {layout.num_bytes}")
    return layout


def digest(data: bytes | memoryview) -> str:
    """Of a piece, as hexadecimal digits: SHA-256."""
    return hashlib.sha256(data).hexdigest()


def file_digest(digests: Sequence[str]) -> str:
    """Of a file with pieces of these digests."""
    return hashlib.sha256(bytes.fromhex("".join(digests))).hexdigest()


def _entries(path: Path, text: bytes, first_byte: int) -> tuple[Entry, ...]:
    """The tensors of a header, which have to lie one behind the other."""
    try:
        said = json.loads(text)
        said.pop("__metadata__", None)
        found = [
            (begin, end, name, entry["dtype"], tuple(entry["shape"]))
            for name, entry in said.items()
            for begin, end in [entry["data_offsets"]]
        ]
        if any(type(number) is not int for each in found for number in each[:2]):
            raise ValueError("offsets are whole numbers")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DamagedError(f"{path}: its header is damaged") from None
    entries, at = [], 0
    for begin, end, name, dtype, shape in sorted(found, key=lambda entry: entry[:2]):
        is_known = (
            isinstance(dtype, str)
            and dtype in ITEM_BYTES
            and all(type(n) is int and n >= 0 for n in shape)
        )
        if not is_known or begin != at or end - begin != prod(shape) * ITEM_BYTES[dtype]:
            raise DamagedError(f"{path}: its header says nothing right of {name!r}")
        entries.append(Entry(name, dtype, shape, first_byte + begin))
        at = end
    return tuple(entries)
