"""A Hugging Face model on a disk: whole tensors in safetensors files, read in any layout's pieces.

    DIR/config.json
    DIR/model.safetensors                       or
    DIR/model.safetensors.index.json            which tensor is in which of
    DIR/model-00001-of-00004.safetensors ...

Nothing of it is believed before it is checked: the index names plain files, each tensor that the
configuration asks for is there once, in its shape and a precision of weights. Only then is memory
taken for anything. Files of other kinds (`.bin`, `.pt`, code) are never opened.

Source: https://huggingface.co/docs/safetensors, "Format", and transformers' index of shards.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from megalite.checkpoint.parts import Part
from megalite.checkpoint.reader import DTYPES
from megalite.checkpoint.regions import as_matrix
from megalite.checkpoint.tensor_file import Entry, read_layout
from megalite.errors import ConfigError, DamagedError
from megalite.hf_config import read_json
from megalite.tensor_names import EMBEDDING, HEAD

WEIGHTS = "model.safetensors"
INDEX = WEIGHTS + ".index.json"
PRECISIONS = ("F32", "BF16", "F16")
DERIVED = ".rotary_emb.inv_freq"
"""Frequencies, which older files hold beside the weights; they follow from the configuration."""
_COMPARED_ELEMENTS = 1 << 22


class Place(NamedTuple):
    """A whole tensor in a file.

    Attributes:
        path: of the file.
        entry: of the tensor in it.
    """

    path: Path
    entry: Entry

    @property
    def dtype(self) -> str:
        """As safetensors calls it."""
        return self.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self.entry.shape


@dataclass(frozen=True)
class HuggingFaceFolder:
    """The weights of a folder; see `Source`.

    Attributes:
        folder: of it.
        tensors: by name.
    """

    folder: Path
    tensors: Mapping[str, Place]

    @classmethod
    def open(cls, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> HuggingFaceFolder:
        """The weights of a folder, of which headers have been read.

        Args:
            folder: with the weights.
            shapes: of all whole tensors that it has to have, by name.

        Raises:
            ConfigError: there are no weights in safetensors files.
            DamagedError: a file, the index or a tensor is not as it should be.
        """
        places = dict(_places(folder))
        tied = places.pop(HEAD, None) if HEAD not in shapes else None
        for name, shape in shapes.items():
            if name not in places:
                raise DamagedError(f"{folder} has no {name}, which its config.json asks for")
            path, entry = places[name]
            if entry.shape != shape:
                raise DamagedError(
                    f"{path}: {name} is of shape {list(entry.shape)}; config.json says "
                    f"{list(shape)}"
                )
            if entry.dtype not in PRECISIONS:
                raise DamagedError(
                    f"{path}: {name} is {entry.dtype}; weights are {', '.join(PRECISIONS)}"
                )
        if unknown := sorted(places.keys() - shapes.keys()):
            raise DamagedError(
                f"{places[unknown[0]].path}: {unknown[0]} is no tensor of the model that "
                "config.json describes"
            )
        found = cls(folder, places)
        if tied is not None:
            found._check_copy(tied)
        return found

    def read(self, part: Part, name: str = "") -> None:
        """Fill a part's values; see `Checkpoint.read`. Pages that hold none of it are not read."""
        place = self.tensors[name or part.name]
        assert place.shape == part.shape, f"{part.name} is {place.shape}, not {part.shape}"
        source, width = self._values(place), as_matrix(part.shape)[1]
        for row, column, rows, columns, at, stride in part.region.rectangles():
            here = part.values[at:].as_strided((rows, columns), (stride, 1))
            here.copy_(source[row * width + column :].as_strided((rows, columns), (width, 1)))

    def whole(self, name: str) -> Tensor:
        """A whole tensor, on the CPU, in the precision that is stored; pages are read when used."""
        place = self.tensors[name]
        return self._values(place).view(place.shape)

    def _values(self, place: Place) -> Tensor:
        """Flat, as the file has them; never written to."""
        path, entry = place
        if path not in self._memory:
            with open(path, "rb") as file:
                # A copy of what is written to, so never of the file; torch wants to be allowed to.
                self._memory[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return torch.frombuffer(
            self._memory[path],
            dtype=DTYPES[entry.dtype],
            count=prod(entry.shape),
            offset=entry.at,
        )

    @cached_property
    def _memory(self) -> dict[Path, mmap.mmap]:
        return {}

    def _check_copy(self, tied: Place) -> None:
        """A head that lies beside an embedding it is tied to has to be equal to it.

        Raises:
            DamagedError: it is not: which one counts would depend on the reader.
        """
        embedding = self.tensors[EMBEDDING]
        same = (embedding.dtype, embedding.shape) == (tied.dtype, tied.shape)
        pairs = zip(
            *(self._values(place).split(_COMPARED_ELEMENTS) for place in (embedding, tied)),
            strict=False,
        )
        if not same or not all(torch.equal(one, other) for one, other in pairs):
            raise DamagedError(
                f"{tied.path}: {HEAD} is not {EMBEDDING}, though config.json has "
                "tie_word_embeddings"
            )


def _places(folder: Path) -> Iterator[tuple[str, Place]]:
    """Every tensor of the folder's weights; of two forms the one that transformers reads."""
    single = folder / WEIGHTS
    if single.exists():
        yield from _entries(single)
        return
    if not (folder / INDEX).exists():
        others = [path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"))]
        advice = (
            f"; {others[0]} is read by tools/convert_checkpoint.py alone, which writes safetensors"
            if others
            else ""
        )
        raise ConfigError(f"{folder} has neither {WEIGHTS} nor {INDEX}{advice}")
    index = folder / INDEX
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise DamagedError(f"{index} has no weight_map")
    by_file: dict[str, set[str]] = {}
    for name, file in names.items():
        if not is_plain(file):
            raise DamagedError(f"{index}: {name} lies in {file!r}, which is no plain file name")
        if not file.endswith(".safetensors"):
            raise DamagedError(f"{index}: {name} lies in {file!r}, which is no safetensors file")
        by_file.setdefault(file, set()).add(name)
    for file, expected in by_file.items():
        found = dict(_entries(folder / file))
        listed = {name for name in expected if not name.endswith(DERIVED)}
        for name in sorted(listed ^ found.keys()):
            where = folder / file if name in listed else f"{index} as a tensor of {file}"
            raise DamagedError(f"{name} is not in {where}")
        yield from found.items()


def _entries(path: Path) -> Iterator[tuple[str, Place]]:
    if not os.path.isfile(path):  # a link to one is one, as in a cache of downloads
        raise DamagedError(f"{path} is not there, or no file")
    for entry in read_layout(path).entries:
        if not entry.name.endswith(DERIVED):
            yield entry.name, Place(path, entry)


def is_plain(file: object) -> TypeGuard[str]:
    """Whether it is the name of a file, and no way out of its folder."""
    return (
        isinstance(file, str)
        and Path(file).name == file
        and not {"\\", "\0"} & set(file)
        and file not in ("", ".", "..")
    )
