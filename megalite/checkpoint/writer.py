"""A rank's file: its parts copied to the host, written and hashed piece by piece in threads."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from megalite.checkpoint.manifest import file_shape
from megalite.checkpoint.parts import Part
from megalite.checkpoint.tensor_file import Layout, Piece, digest, lay_out
from megalite.errors import ConfigError


class Staging:
    """Room in the host's memory for one rank's file, used again by every save.

    On a GPU it is pinned where it lies: torch's own pinned blocks are rounded up to a power of two.

    Args:
        device: where the values come from.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def reserve(self, num_bytes: int) -> None:
        """Make room for a file of this size, at least.

        Raises:
            ConfigError: there is not so much memory that can be pinned.
        """
        if len(self._buffer) >= num_bytes:
            return
        self._unpin()
        # Written to by many threads first: pages that are there are pinned four times as fast.
        self._buffer = torch.empty(num_bytes, dtype=torch.uint8).zero_()
        if self._copies is not None:
            runtime = torch.cuda.cudart()
            error = runtime.cudaHostRegister(self._buffer.data_ptr(), num_bytes, 0)
            if int(error):
                raise ConfigError(
                    f"--save: {num_bytes / 2**30:.1f} GiB of the host's memory can't be pinned "
                    f"({error}); raise the limit (ulimit -l), or give the run more memory"
                )

    def take(self, parts: Sequence[Part], layout: Layout) -> torch.cuda.Event | None:
        """Copy the values of parts to where their file has them.

        Returns:
            Reached when all are there, on a GPU; until then nothing may write to the parts.
        """
        self.reserve(layout.num_bytes)
        self._buffer[: len(layout.header)] = torch.frombuffer(
            bytearray(layout.header), dtype=torch.uint8
        )
        values = {part.name: part.values for part in parts}
        if self._copies is None:
            self._copy(values, layout)
            return None
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            self._copy(values, layout)
            return self._copies.record_event()

    def bytes(self, piece: Piece) -> memoryview:
        """A piece of the file, as it lies in memory."""
        address = self._buffer.data_ptr() + piece.at
        return memoryview((ctypes.c_char * piece.num_bytes).from_address(address)).cast("B")

    def _copy(self, values: dict[str, Tensor], layout: Layout) -> None:
        for entry in layout.entries:
            here = self._buffer[entry.at : entry.at + entry.num_bytes]
            here.copy_(values[entry.name].view(torch.uint8), non_blocking=True)

    def _unpin(self) -> None:
        if self._copies is not None and len(self._buffer):
            torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr())

    def __del__(self) -> None:
        self._unpin()


def layout_of(parts: Sequence[Part], rank: int) -> Layout:
    """The layout of a rank's file. Its header says of each slice where it lies in the whole."""
    return lay_out(
        ((part.name, part.dtype, file_shape(part.region, part.shape)) for part in parts),
        {"format": "pt", "megalite": f"slices of world rank {rank}; see manifest.json"},
    )


def write_file(
    path: Path, layout: Layout, staging: Staging, threads: int, halfway: Callable[[], None]
) -> tuple[str, ...]:
    """Write a file and put it on the disk; each piece is written and hashed by one of some threads.

    Args:
        path: a new file.
        layout, staging: what it consists of.
        threads: how many.
        halfway: called when about half of it is written.

    Returns:
        The digest of each piece.

    Raises:
        OSError: the disk is full, or anything else went wrong.
    """
    pieces = layout.pieces()
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:

        def write(piece: Piece) -> str:
            data, done = staging.bytes(piece), 0
            while done < len(data):
                done += os.pwrite(descriptor, data[done:], piece.at + done)
            return digest(data)

        with ThreadPoolExecutor(threads) as pool:
            first = list(pool.map(write, pieces[: len(pieces) // 2]))
            halfway()
            digests = (*first, *pool.map(write, pieces[len(pieces) // 2 :]))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return digests


def read_back(path: Path, layout: Layout, digests: Sequence[str], threads: int) -> bool:
    """Whether a file that was written holds what it should, read from the disk as far as the
    system lets us choose."""
    with open(path, "rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with ThreadPoolExecutor(threads) as pool:
            found = pool.map(
                lambda piece: digest(os.pread(file.fileno(), piece.num_bytes, piece.at)),
                layout.pieces(),
            )
            return tuple(found) == tuple(digests)
