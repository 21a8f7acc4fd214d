"""A checkpoint that is there: its tensors, in any layout's pieces; whether its bytes are right."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from megalite.checkpoint.directory import Directory
from megalite.checkpoint.manifest import (
    NAME,
    Manifest,
    StoredFile,
    StoredTensor,
    open_file,
    read_manifest,
)
from megalite.checkpoint.parts import DTYPE_NAMES, Part
from megalite.checkpoint.regions import overlap, whole
from megalite.checkpoint.tensor_file import PIECE_BYTES, Entry, Piece, digest
from megalite.errors import DamagedError

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {name: dtype for dtype, name in DTYPE_NAMES.items()}
)


class Damage(NamedTuple):
    """A piece of a file whose digest is another one.

    Attributes:
        file: name.
        piece: of it.
    """

    file: str
    piece: Piece

    def __str__(self) -> str:
        what = f"of {self.piece.name}" if self.piece.name else "of the header"
        return (
            f"{self.file}: bytes {self.piece.at} to {self.piece.at + self.piece.num_bytes}, {what}"
        )


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest, sizes and headers are right; its values are read when asked for.

    Attributes:
        folder: of it.
        manifest: what is in it.
    """

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """The checkpoint in a folder.

        Raises:
            DamagedError: there is none, or it is damaged or hostile; see `read_manifest`.
        """
        return cls(folder, read_manifest(folder))

    @classmethod
    def newest(cls, path: Path) -> Checkpoint:
        """The newest checkpoint of a folder of them that is not damaged, or the one in a folder.

        Raises:
            DamagedError: there is none.
        """
        if (path / NAME).exists():
            return cls.open(path)
        directory, damaged = Directory(path), []
        for step, wrong in directory.valid_steps():
            if not wrong:
                return cls.open(directory.folder(step))
            damaged.append(wrong)
        raise DamagedError([f"{path} holds no checkpoint that can be used", *damaged])

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """By name."""
        return self.manifest.tensors

    def read(self, part: Part, name: str = "") -> None:
        """Fill a part's values, which may be of another precision.

        Args:
            part: of a tensor of the shape that is stored.
            name: of the tensor that is stored; empty: the part's own.
        """
        name = name or part.name
        stored = self.tensors[name]
        assert stored.shape == part.shape, f"{name} is {stored.shape}, not {part.shape}"
        targets = list(part.region.rectangles())
        for each in stored.slices:
            source: Tensor | None = None
            for rectangle in each.region.rectangles():
                for target in targets:
                    copy = overlap(rectangle, target)
                    if copy is None:
                        continue
                    if source is None:
                        source = self._values(each.file, name)
                    size = copy.rows, copy.columns
                    here = _strided(part.values, size, copy.target_stride, copy.target_at)
                    here.copy_(_strided(source, size, copy.source_stride, copy.source_at))

    def whole(self, name: str) -> Tensor:
        """A whole tensor, on the CPU, in the precision that is stored."""
        stored = self.tensors[name]
        region = whole(stored.shape)
        values = torch.empty(region.length, dtype=DTYPES[stored.dtype])
        self.read(Part(name, stored.shape, region, values))
        return values.view(stored.shape)

    def damages(self, files: Sequence[int] | None = None) -> list[Damage]:
        """Pieces that are not what was written; reads all bytes of the files.

        Args:
            files: their numbers; None: all.

        Raises:
            DamagedError: one can't be read.
        """
        chosen = range(len(self.manifest.files)) if files is None else files
        pieces = [
            (file, piece, expected)
            for file in (self.manifest.files[number] for number in chosen)
            for piece, expected in zip(
                open_file(self.folder, file).pieces(), file.digests, strict=True
            )
        ]
        room = threading.local()  # each thread reads into the same memory again and again
        with ThreadPoolExecutor(threads()) as pool:
            found = pool.map(lambda item: self._is_right(room, *item), pieces)
            return [
                Damage(file.name, piece)
                for (file, piece, _), right in zip(pieces, found, strict=True)
                if not right
            ]

    def _is_right(
        self, room: threading.local, file: StoredFile, piece: Piece, expected: str
    ) -> bool:
        path = self.folder / file.name
        if not hasattr(room, "bytes"):
            room.bytes = memoryview(bytearray(PIECE_BYTES))
        data = room.bytes[: piece.num_bytes]
        if len(data) < piece.num_bytes:  # a header may be longer
            data = memoryview(bytearray(piece.num_bytes))
        try:
            with open(path, "rb") as opened:
                opened.seek(piece.at)
                count = opened.readinto(data)
        except OSError as error:
            raise DamagedError(f"{path} can't be read: {error.strerror}") from None
        return count == piece.num_bytes and digest(data) == expected

    def _values(self, file: int, name: str) -> Tensor:
        """A slice's values as its file has them, flat; its pages are read when they are used."""
        opened = self._opened(file)
        entry = opened.entries[name]
        count = entry.num_bytes // DTYPES[entry.dtype].itemsize
        return torch.frombuffer(
            opened.memory, dtype=DTYPES[entry.dtype], count=count, offset=entry.at
        )

    def _opened(self, file: int) -> _Opened:
        if file not in self._files:
            stored = self.manifest.files[file]
            layout = open_file(self.folder, stored)
            with open(self.folder / stored.name, "rb") as opened:
                # A copy of what is written to, so never of a file; torch wants to be allowed to.
                memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            self._files[file] = _Opened(memory, {entry.name: entry for entry in layout.entries})
        return self._files[file]

    @cached_property
    def _files(self) -> dict[int, _Opened]:
        return {}


@dataclass(frozen=True)
class _Opened:
    memory: mmap.mmap
    entries: Mapping[str, Entry]


def threads() -> int:
    """As many as this process may use, of those that hash and write."""
    return max(1, min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4))


def _strided(x: Tensor, size: tuple[int, int], stride: int, at: int) -> Tensor:
    return x.as_strided(size, (stride, 1), x.storage_offset() + at)
