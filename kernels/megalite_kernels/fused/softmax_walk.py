"""Softmax whose rows are walked in blocks twice: once for their statistics, once for the result.

The second read of a row comes from the L2 cache, where the first asks it to stay. Of a causal
matrix a program takes the i-th longest row and the i-th shortest, so that all have equal work.
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
    _forward[(_num_programs(x.shape[0], causal, queries),)](
        x,
        view.mask,
        y,
        scale,
        x.stride(0) // unit,
        keys // unit,
        queries,
        view.size1,
        view.size2,
        view.stride0 // unit,
        view.stride1 // unit,
        view.stride2 // unit,
        UNIT=unit,
        BLOCK=plan.block,
        MASK=view.kind,
        STEP=view.step,
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
def _place(turn, keys, queries, UNIT: tl.constexpr, CAUSAL: tl.constexpr):
    """(row, its last visible key, end of what is loaded) of this program's longer or shorter row.

    The middle row of an odd number of queries is both, and is computed twice.
    """
    index = tl.program_id(0).to(tl.int64)
    row = index
    last = keys - 1
    if CAUSAL:
        half = (queries + 1) // 2
        short = (index % half).to(tl.int32)
        query = tl.where(turn == 0, queries - 1 - short, short)
        row = index // half * queries + query
        last = query + keys - queries
    end = tl.maximum(last // UNIT + 1, 0) * UNIT
    return row, last, end


@triton.jit
def _store_zeros(y, end, keys, BLOCK: tl.constexpr):
    """In the blocks that begin at `end` or after."""
    zero = tl.zeros([BLOCK], dtype=y.dtype.element_ty)
    for start in tl.range(tl.cdiv(end, BLOCK) * BLOCK, keys, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        tl.store(y + columns, zero, mask=columns < keys)


@triton.jit(do_not_specialize=["x_units", "key_units", "queries", "stride0", "stride1", "stride2"])
def _forward(
    x,
    mask,
    y,
    scale,
    x_units,
    key_units,
    queries,
    size1,
    size2,
    stride0,
    stride1,
    stride2,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    MASK: tl.constexpr,
    STEP: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    if MASK == "added":
        factor = LOG2E
    else:
        factor = scale * LOG2E
    keys = key_units * UNIT
    for turn in tl.range(2 if CAUSAL else 1):
        row, last, end = _place(turn, keys, queries, UNIT, CAUSAL)
        x_row = x + row * x_units * UNIT
        y_row = y + row * key_units * UNIT
        hides = mask
        if MASK != "none":
            hides = mask + mask_row(row, size1, size2, stride0, stride1, stride2) * UNIT
        peak = tl.full([], -float("inf"), tl.float32)
        total = tl.full([], 0.0, tl.float32)
        for start in tl.range(0, end, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            scores = load_scores(
                x_row, hides, columns, columns < end, last, scale, MASK, STEP, CAUSAL, "evict_last"
            )
            higher = tl.maximum(peak, tl.max(scores, 0))
            shift = shift_of(higher)
            terms = tl.exp2((scores - shift) * factor)
            total = total * tl.exp2((peak - shift) * factor) + tl.sum(terms, 0)
            peak = higher
        shift = shift_of(peak)
        inverse = over_total(total)
        for start in tl.range(0, end, BLOCK):
            columns = start + tl.arange(0, BLOCK)
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
        row, last, end = _place(turn, keys, queries, UNIT, CAUSAL)
        dy_row = dy + row * dy_units * UNIT
        y_row = y + row * key_units * UNIT
        dx_row = dx + row * key_units * UNIT
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
