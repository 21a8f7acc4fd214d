"""Safetensors files of whole tensors, written by many ranks at once, each its own parts in place.

One rank makes the files, of their full length, with headers; then everybody writes. Nothing is
gathered: a rank's part of a tensor is at most three rectangles, and a rectangle is written row by
row, or in one go where it is as wide as the tensor. The folder has to be one for all ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megalite.checkpoint.parts import Part
from megalite.checkpoint.reader import DTYPES
from megalite.checkpoint.regions import Rectangle, as_matrix
from megalite.checkpoint.tensor_file import ITEM_BYTES, PIECE_BYTES, Entry, Layout, lay_out
from megalite.errors import DataError

MOST_BYTES = 5_000_000_000
"""Of the tensors in one file, if it holds more than one."""


@dataclass(frozen=True)
class WholeFiles:
    """The files, which are equal in every rank's eyes before there are any.

    Attributes:
        folder: that they are in.
        layouts: of each, by name.
    """

    folder: Path
    layouts: Mapping[str, Layout]

    @classmethod
    def plan(
        cls, folder: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], most_bytes: int
    ) -> WholeFiles:
        """As few files as hold tensors of at most so many bytes each, in their order.

        Args:
            folder: that they will be in.
            tensors: dtype, as safetensors calls it, and shape of each, by name.
            most_bytes: see `MOST_BYTES`.
        """
        groups: list[list[tuple[str, str, tuple[int, ...]]]] = []
        held = most_bytes
        for name, (dtype, shape) in tensors.items():
            size = prod(shape) * ITEM_BYTES[dtype]
            if held + size > most_bytes:
                groups.append([])
                held = 0
            groups[-1].append((name, dtype, shape))
            held += size
        names = (
            ["model.safetensors"]
            if len(groups) == 1
            else [
                f"model-{number:05d}-of-{len(groups):05d}.safetensors"
                for number in range(1, len(groups) + 1)
            ]
        )
        layouts = (lay_out(group, {"format": "pt"}) for group in groups)
        return cls(folder, dict(zip(names, layouts, strict=True)))

    def create(self) -> None:
        """Make all files, without values; one rank does, before any writes."""
        for name, layout in self.layouts.items():
            with open(self.folder / name, "xb") as file:
                file.write(layout.header)
                file.truncate(layout.num_bytes)

    def write(self, parts: Iterable[Part]) -> None:
        """Write parts of the tensors, in the files' precision, and put them on the disk.

        Raises:
            DataError: a value is too large for that precision.
            OSError: the disk is full, the folder is not there, or anything else went wrong.
        """
        places = {
            entry.name: (name, entry)
            for name, layout in self.layouts.items()
            for entry in layout.entries
        }
        opened: dict[str, int] = {}
        try:
            for part in parts:
                name, entry = places[part.name]
                if name not in opened:
                    opened[name] = os.open(self.folder / name, os.O_WRONLY)
                for rectangle in part.region.rectangles():
                    _write(opened[name], entry, rectangle, part.values)
            for descriptor in opened.values():
                os.fsync(descriptor)
        finally:
            for descriptor in opened.values():
                os.close(descriptor)


def _write(descriptor: int, entry: Entry, rectangle: Rectangle, values: Tensor) -> None:
    """One rectangle of a part, a few rows at a time."""
    size, width = ITEM_BYTES[entry.dtype], as_matrix(entry.shape)[1]
    here = values[rectangle.at :].as_strided(
        (rectangle.rows, rectangle.columns), (rectangle.stride, 1)
    )
    row = rectangle.row
    for block in here.split(max(1, PIECE_BYTES // (rectangle.columns * size))):
        data, length = _bytes(entry, block), rectangle.columns * size
        if rectangle.columns == width:
            length = len(data)  # its rows are neighbours in the file
        for begin in range(0, len(data), length):
            at = entry.at + (row * width + rectangle.column) * size
            _write_all(descriptor, data[begin : begin + length], at)
            row += length // (rectangle.columns * size)


def _bytes(entry: Entry, values: Tensor) -> memoryview:
    """Values in the precision of the file."""
    cast = values.to("cpu", DTYPES[entry.dtype]).contiguous()
    if entry.dtype == "F16" and not torch.equal(cast.isfinite(), values.cpu().isfinite()):
        raise DataError(f"{entry.name} has values above 65504, which fp16 can't hold: take bf16")
    return cast.view(torch.uint8).view(-1).numpy().data


def _write_all(descriptor: int, data: memoryview, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], at + done)
