"""What weights are read from, whoever wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from megalite.checkpoint.parts import Part


class Described(Protocol):
    """A whole tensor."""

    @property
    def dtype(self) -> str:
        """As safetensors calls it."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Without padding."""
        ...


class Source(Protocol):
    """Whole tensors on a disk, of which a rank reads what it has."""

    @property
    def tensors(self) -> Mapping[str, Described]:
        """By name."""
        ...

    def read(self, part: Part, name: str = "") -> None:
        """Fill a part's values; see `Checkpoint.read`."""
        ...

    def whole(self, name: str) -> Tensor:
        """A whole tensor, on the CPU, in the precision that is stored."""
        ...
