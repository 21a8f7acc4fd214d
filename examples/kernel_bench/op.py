"""What a case is made of: an op's inputs, floor bytes and definition in high precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernel_bench.problem import BACKWARD, FORWARD, Expected, Problem

CHUNK_ELEMENTS = 1 << 26
"""Of a reference computed in fp64 at a time: half a gigabyte for each tensor of it."""


class Floor(NamedTuple):
    """The fewest bytes that the work can read and write."""

    read: int
    written: int

    @property
    def total(self) -> int:
        """Both."""
        return self.read + self.written


@dataclass(frozen=True)
class Op:
    """An operation that contestants are compared on.

    Args:
        name: of the command line and the table.
        form: names of the numbers of a size, joined by x.
        directions: what is measured of it, each a row.
        table: (size, directions) of the rows that `--table` runs.
        sweep: sizes of the full sweep, which `--op` runs without `--sizes`.
        small: the size on which host time is measured and the CPU tests run.
        make: (size, direction, device, dtype) to the problem.
        floor: (size, direction) to bytes, for 2-byte elements.
        reference: what the results should be, outputs first, then gradients of the leaves.
        outputs: how many results the forward has.
        tolerance: largest ||result - reference|| / ||reference|| of a right contestant.
        flops: useful floating-point operations of a size; None if the bytes are what counts.
        check: the size that a contestant is checked on, where the measured one is too large.
    """

    name: str
    form: str
    directions: tuple[str, ...]
    table: tuple[tuple[str, tuple[str, ...]], ...]
    sweep: tuple[str, ...]
    small: str
    make: Callable[[tuple[int, ...], str, torch.device, torch.dtype], Problem]
    floor: Callable[[tuple[int, ...], str], Floor]
    reference: Callable[[Problem], Iterator[Expected]]
    outputs: int
    tolerance: float = 1e-2
    flops: Callable[[tuple[int, ...]], float] | None = None
    check: Callable[[tuple[int, ...]], tuple[int, ...]] = tuple

    def parse(self, text: str) -> tuple[int, ...]:
        """The numbers of a size such as "8192x4096".

        Raises:
            ValueError: says what a size of this op looks like.
        """
        names = self.form.split("x")
        words = text.lower().split("x")
        if len(words) != len(names) or not all(word.isdigit() and int(word) for word in words):
            raise ValueError(
                f"{self.name}: {text!r} is not a size; it is {self.form}, for instance {self.small}"
            )
        return tuple(int(word) for word in words)

    def expected(self, problem: Problem) -> Iterator[Expected]:
        """The reference's results that the problem's direction has, numbered from 0."""
        first, last = 0, math.inf
        if problem.direction == FORWARD:
            last = self.outputs
        elif problem.direction == BACKWARD:
            first = self.outputs
        for index, rows, value in self.reference(problem):
            if first <= index < last:
                yield index - first, rows, value


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows small enough for fp64."""
    step = max(1, CHUNK_ELEMENTS // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def normal(
    shape: tuple[int, ...], like: tuple[torch.device, torch.dtype], std: float = 1
) -> Tensor:
    """Fresh random numbers."""
    device, dtype = like
    return torch.randn(shape, device=device, dtype=dtype).mul_(std)


def size_text(size: tuple[int, ...]) -> str:
    """(8192, 4096) to "8192x4096"."""
    return "x".join(map(str, size))
