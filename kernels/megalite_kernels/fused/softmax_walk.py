"""Softmax whose rows are walked in blocks twice: once for their statistics, once for the result.

The second read of a row comes from the caches, where the first asks it to stay, and begins where
that ended. Statistics are kept per vector of 16 bytes, not per row, so that threads wait for one
another once a row, not twice a block. Of a causal matrix a program takes the i-th longest row and
the i-th shortest, so that all have equal work.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.fused.softmax_held import (
    LOG2E,
    MaskView,
    load_scores,
    mask_row,
    over_total,
    shift_of,
    unit_of,
)


class Walk(NamedTuple):
    """How rows that are walked are launched.

    Attributes:
        block: keys of one step.
        warps: of a program.
        registers: of a thread at most: fewer let more programs share a multiprocessor.
    """

    block: int
    warps: int
    registers: int


def walk_forward(
    x: Tensor, view: MaskView, y: Tensor, scale: float, causal: bool, queries: int, plan: Walk
) -> None:
    """As `held_forward`, for rows of any length."""
    keys, unit = x.shape[1], unit_of(x, x.shape[1], x.stride(0), *view[4:7])
    queries, sharers = view.order(causal, queries)
    _forward[(_num_programs(x.shape[0], causal, queries),)](
        x,
        view.mask,
        y,
        scale,
        x.stride(0) // unit,
        keys // unit,
        queries,
        sharers,
        view.size1,
        view.size2,
        view.stride0 // unit,
        view.stride1 // unit,
        view.stride2 // unit,
        UNIT=unit,
        BLOCK=plan.block,
        VECTOR=16 // x.element_size(),
        MASK=view.kind,
        STEP=view.step,
        SHARED=sharers > 1,
        CAUSAL=causal,
        num_warps=plan.warps,
        maxnreg=plan.registers,
    )


def walk_backward(
    dy: Tensor, y: Tensor, dx: Tensor, scale: float, causal: bool, queries: int, plan: Walk
) -> None:
    """As `held_backward`, for rows of any length."""
    keys, unit = y.shape[1], unit_of(y, y.shape[1], dy.stride(0))
    _backward[(_num_programs(y.shape[0], causal, queries),)](
        dy,
        y,
        dx,
        scale,
        dy.stride(0) // unit,
        keys // unit,
        queries,
        UNIT=unit,
        BLOCK=plan.block,
        CAUSAL=causal,
        num_warps=plan.warps,
        maxnreg=plan.registers,
    )


def _num_programs(num_rows: int, causal: bool, queries: int) -> int:
    return num_rows // queries * triton.cdiv(queries, 2) if causal else num_rows


@triton.jit
def _place(
    turn, keys, queries, sharers, UNIT: tl.constexpr, SHARED: tl.constexpr, CAUSAL: tl.constexpr
):
    """(row, its last visible key, end of what is loaded) of this program's longer or shorter row.

    The middle row of an odd number of queries is both, and is computed twice.
    """
    index = tl.program_id(0)
    row = index
    last = keys - 1
    if SHARED or CAUSAL:
        count = queries
        if CAUSAL:
            count = (queries + 1) // 2
        query = index // sharers % count
        matrix = index // sharers // count * sharers + index % sharers
        if CAUSAL:
            query = tl.where(turn == 0, queries - 1 - query, query)
            last = query + keys - queries
        row = matrix * queries + query
    end = tl.maximum(last // UNIT + 1, 0) * UNIT
    return row, last, end


@triton.jit
def _store_zeros(y, end, keys, BLOCK: tl.constexpr):
    """In the blocks that begin at `end` or after."""
    zero = tl.zeros([BLOCK], dtype=y.dtype.element_ty)
    for start in tl.range(tl.cdiv(end, BLOCK) * BLOCK, keys, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        tl.store(y + columns, zero, mask=columns < keys)


@triton.jit(
    do_not_specialize=[
        "x_units",
        "key_units",
        "queries",
        "sharers",
        "stride0",
        "stride1",
        "stride2",
    ]
)
def _forward(
    x,
    mask,
    y,
    scale,
    x_units,
    key_units,
    queries,
    sharers,
    size1,
    size2,
    stride0,
    stride1,
    stride2,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    MASK: tl.constexpr,
    STEP: tl.constexpr,
    SHARED: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    if MASK == "added":
        factor = LOG2E
    else:
        factor = scale * LOG2E
    VECTORS: tl.constexpr = BLOCK // VECTOR
    tile = tl.arange(0, VECTORS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    keys = key_units * UNIT
    for turn in tl.range(2 if CAUSAL else 1):
        row, last, end = _place(turn, keys, queries, sharers, UNIT, SHARED, CAUSAL)
        x_row = x + row.to(tl.int64) * x_units * UNIT
        y_row = y + row.to(tl.int64) * key_units * UNIT
        hides = mask
        if MASK != "none":
            hides = mask + mask_row(row, size1, size2, stride0, stride1, stride2) * UNIT
        peaks = tl.full([VECTORS], -float("inf"), tl.float32)
        totals = tl.zeros([VECTORS], tl.float32)
        for start in tl.range(0, end, BLOCK):
            columns = start + tile
            scores = load_scores(
                x_row, hides, columns, columns < end, last, scale, MASK, STEP, CAUSAL, "evict_last"
            )
            higher = tl.maximum(peaks, tl.max(scores, 1))
            shifts = shift_of(higher)
            terms = tl.exp2((scores - shifts[:, None]) * factor)
            totals = totals * tl.exp2((peaks - shifts) * factor) + tl.sum(terms, 1)
            peaks = higher
        shift = shift_of(tl.max(peaks, 0))
        inverse = over_total(tl.sum(totals * tl.exp2((peaks - shift) * factor), 0))
        for back in tl.range(0, end, BLOCK):
            columns = tl.cdiv(end, BLOCK) * BLOCK - BLOCK - back + tile
            scores = load_scores(
                x_row, hides, columns, columns < end, last, scale, MASK, STEP, CAUSAL, "evict_first"
            )
            terms = tl.exp2((scores - shift) * factor) * inverse
            tl.store(y_row + columns, terms.to(y.dtype.element_ty), mask=columns < keys)
        if CAUSAL:
            _store_zeros(y_row, end, keys, BLOCK)


@triton.jit
def _load_pair(dy, y, columns, end, last, CAUSAL: tl.constexpr, EVICT: tl.constexpr):
    """The incoming gradient and the weights in fp32, zero where the key is hidden."""
    slope = tl.load(dy + columns, mask=columns < end, other=0, eviction_policy=EVICT)
    weight = tl.load(y + columns, mask=columns < end, other=0, eviction_policy=EVICT)
    slope = slope.to(tl.float32)
    if CAUSAL:
        slope = tl.where(columns <= last, slope, 0.0)
    return slope, weight.to(tl.float32)


@triton.jit(do_not_specialize=["dy_units", "key_units", "queries"])
def _backward(
    dy,
    y,
    dx,
    scale,
    dy_units,
    key_units,
    queries,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    keys = key_units * UNIT
    for turn in tl.range(2 if CAUSAL else 1):
        row, last, end = _place(turn, keys, queries, 1, UNIT, False, CAUSAL)
        dy_row = dy + row.to(tl.int64) * dy_units * UNIT
        y_row = y + row.to(tl.int64) * key_units * UNIT
        dx_row = dx + row.to(tl.int64) * key_units * UNIT
        products = tl.zeros([BLOCK], dtype=tl.float32)
        for start in tl.range(0, end, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            slope, weight = _load_pair(dy_row, y_row, columns, end, last, CAUSAL, "evict_last")
            products += slope * weight
        mean = tl.sum(products, 0)
        for start in tl.range(0, end, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            slope, weight = _load_pair(dy_row, y_row, columns, end, last, CAUSAL, "evict_first")
            result = scale * weight * (slope - mean)
            tl.store(dx_row + columns, result.to(dx.dtype.element_ty), mask=columns < keys)
        if CAUSAL:
            _store_zeros(dx_row, end, keys, BLOCK)
