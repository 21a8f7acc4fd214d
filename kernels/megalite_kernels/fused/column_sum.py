"""The sum over rows of a tall fp32 matrix: the last step of a weight's gradient.

A backward kernel whose programs each walk over many rows leaves one fp32 row per program; this
kernel sums them and rounds once, straight into the weight's dtype. `partials.sum(0).to(dtype)`
takes two launches, and at small shapes those cost more than the work.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from megalite_kernels.fused.launch import on_device


class Tile(NamedTuple):
    """What one program sums: `columns` of the matrix, `rows` at a time, with `warps`."""

    rows: int
    columns: int
    warps: int


NARROW, WIDE = Tile(512, 16, 4), Tile(128, 16, 4)
"""Up to 8192 columns one tile that holds every row fills the card; beyond, more programs do."""


def column_sum(
    partials: Tensor, dtype: torch.dtype, tile: Tile | None = None, early: bool = False
) -> Tensor:
    """Sum over the rows, in fp32, rounded once; the same bits on every run.

    Reads 4 bytes per element, mostly from the L2 cache that the writer left them in.

    Args:
        partials: [R, C], contiguous, fp32, R > 0.
        dtype: of the result.
        tile: of a program; by width if None.
        early: start while the kernel before it, which writes `partials`, still ends, and wait there
            for it: programmatic dependent launch, where `can_start_early`.

    Returns:
        [C].
    """
    rows, columns = partials.shape
    tile = tile or (NARROW if columns <= 8192 else WIDE)
    out = torch.empty(columns, dtype=dtype, device=partials.device)
    options = {"launch_pdl": True} if early else {}
    with on_device(partials):
        _column_sum_kernel[(triton.cdiv(columns, tile.columns),)](
            partials,
            out,
            rows,
            width=columns,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            EARLY=early,
            num_warps=tile.warps,
            **options,
        )
    return out


def can_start_early(x: Tensor) -> bool:
    """Whether x's device can launch a kernel before the one that it follows has ended."""
    return x.is_cuda and _capability(x.get_device()) >= (9, 0)


@functools.cache
def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)


@triton.jit(do_not_specialize=["rows"])
def _column_sum_kernel(
    partials,
    out,
    rows,
    width: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = column < width
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        pointers = partials + row.to(tl.int64) * width + column
        total += tl.load(pointers, mask=(row < rows) & inside, other=0.0).to(tl.float32)
    summed = tl.sum(total, axis=0, keep_dims=True)
    tl.store(out + column, summed.to(out.dtype.element_ty), mask=inside)
