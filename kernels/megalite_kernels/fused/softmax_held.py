"""Softmax whose rows lie whole in registers: each number is read once and written once.

A program takes one row, or several short ones.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)


class Held(NamedTuple):
    """How rows held in registers are launched: by programs of so many warps."""

    warps: int


class MaskView(NamedTuple):
    """A mask that is broadcast where it lies: row r of the scores has the mask's row at

    (r // (size1 size2)) stride0 + (r // size2 % size1) stride1 + (r % size2) stride2.

    Attributes:
        mask: None if there is none.
        kind: "none", "bool" or "added".
        step: from one key to the next, 1; 0 if all have the same.
    """

    mask: Tensor | None = None
    kind: str = "none"
    size1: int = 1
    size2: int = 1
    stride0: int = 0
    stride1: int = 0
    stride2: int = 0
    step: int = 0

    def order(self, causal: bool, queries: int) -> tuple[int, int]:
        """(queries of a matrix, matrices whose same query is taken one after the other).

        Matrices that share a mask, as heads do, are taken together: one after another, each finds
        that the L2 cache has lost the mask to the scores of the one before.
        """
        if self.stride1 or not self.stride2 or (causal and self.size2 != queries):
            return queries, 1
        return self.size2, self.size1


def held_forward(
    x: Tensor, view: MaskView, y: Tensor, scale: float, causal: bool, queries: int, plan: Held
) -> None:
    """Write the softmax of x's rows, [rows, keys] with keys side by side, to a contiguous y."""
    keys, unit = x.shape[1], unit_of(x, x.shape[1], x.stride(0), *view[4:7])
    queries, sharers = view.order(causal, queries)
    block = triton.next_power_of_2(keys)
    rows = rows_per_program(block)
    _forward[(triton.cdiv(x.shape[0], rows),)](
        x,
        view.mask,
        y,
        scale,
        x.stride(0) // unit,
        keys // unit,
        x.shape[0],
        queries,
        sharers,
        view.size1,
        view.size2,
        view.stride0 // unit,
        view.stride1 // unit,
        view.stride2 // unit,
        UNIT=unit,
        BLOCK=block,
        ROWS=rows,
        MASK=view.kind,
        STEP=view.step,
        SHARED=sharers > 1,
        CAUSAL=causal,
        num_warps=plan.warps,
    )


def held_backward(
    dy: Tensor, y: Tensor, dx: Tensor, scale: float, causal: bool, queries: int, plan: Held
) -> None:
    """Write scale * y * (dy - sum(dy * y)) to a contiguous dx; y is contiguous, dy like the x."""
    keys, unit = y.shape[1], unit_of(y, y.shape[1], dy.stride(0))
    block = triton.next_power_of_2(keys)
    rows = rows_per_program(block)
    _backward[(triton.cdiv(y.shape[0], rows),)](
        dy,
        y,
        dx,
        scale,
        dy.stride(0) // unit,
        keys // unit,
        y.shape[0],
        queries,
        UNIT=unit,
        BLOCK=block,
        ROWS=rows,
        CAUSAL=causal,
        num_warps=plan.warps,
    )


def unit_of(x: Tensor, *lengths: int) -> int:
    """Largest power of two that divides all, up to 16 bytes of x: how wide loads may be.

    Lengths reach the kernels as multiples of it. A mask is read in the same steps as x even if its
    elements are smaller: otherwise Triton moves the results between threads before it stores them.
    """
    bits = 16 // x.element_size()
    for length in lengths:
        bits |= length
    return bits & -bits


def rows_per_program(block: int) -> int:
    """Short rows share a program, so that it has enough to read."""
    return max(1, 1024 // block)


@triton.jit
def mask_row(row, size1, size2, stride0, stride1, stride2):
    """Where in the mask the row begins."""
    outer = row // size2
    offset = (outer // size1).to(tl.int64) * stride0
    return offset + (outer % size1).to(tl.int64) * stride1 + (row % size2).to(tl.int64) * stride2


@triton.jit
def load_scores(
    x,
    mask,
    columns,
    loaded,
    last,
    scale,
    MASK: tl.constexpr,
    STEP: tl.constexpr,
    CAUSAL: tl.constexpr,
    EVICT: tl.constexpr,
):
    """Scores in fp32, -inf where the key is hidden, and scaled only if a mask is added to them."""
    lowest = -float("inf")
    scores = tl.load(x + columns, mask=loaded, other=lowest, eviction_policy=EVICT).to(tl.float32)
    if MASK == "bool":
        hidden = tl.load(mask + columns * STEP, mask=loaded, other=0)
        scores = tl.where(hidden != 0, lowest, scores)
    elif MASK == "added":
        added = tl.load(mask + columns * STEP, mask=loaded, other=0).to(tl.float32)
        scores = scores * scale + added
    if CAUSAL:
        scores = tl.where(columns <= last, scores, lowest)
    return scores


@triton.jit
def over_total(total):
    """1 / total, and 0 for a row without a key.

    A row with a key has a total of at least 1, as its largest term is exp(0); one without, whose
    terms are all 0, has exactly 0: the total is the flag.
    """
    has_key = total != 0
    return tl.where(has_key, 1.0 / tl.where(has_key, total, 1.0), 0.0)


@triton.jit
def shift_of(peak):
    """What to take from the scores: their maximum; of a row without a key anything finite."""
    return tl.where(peak == -float("inf"), 0.0, peak)


@triton.jit
def _place(
    num_rows,
    queries,
    sharers,
    ROWS: tl.constexpr,
    SHARED: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """(row, its query, whether it exists) of this program, [ROWS, 1] each, longest rows first.

    In 32 bits, which are far quicker to divide, unless there can be more rows than programs.
    """
    index = tl.program_id(0)
    if ROWS > 1:
        index = index.to(tl.int64)
    index = index * ROWS + tl.arange(0, ROWS)[:, None]
    row, query = index, index
    if SHARED or CAUSAL:
        turn = index // sharers
        query = turn % queries
        if CAUSAL:
            query = queries - 1 - query
        row = (turn // queries * sharers + index % sharers) * queries + query
    return row, query, index < num_rows


@triton.jit(
    do_not_specialize=[
        "x_units",
        "key_units",
        "num_rows",
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
    num_rows,
    queries,
    sharers,
    size1,
    size2,
    stride0,
    stride1,
    stride2,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    MASK: tl.constexpr,
    STEP: tl.constexpr,
    SHARED: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    keys = key_units * UNIT
    row, query, exists = _place(num_rows, queries, sharers, ROWS, SHARED, CAUSAL)
    columns = tl.arange(0, BLOCK)[None, :]
    within = exists & (columns < keys)
    last, loaded = query, within
    if CAUSAL:
        last = query.to(tl.int32) + keys - queries
        # Whole units are loaded, so that the loads stay wide.
        loaded = exists & (columns < (last // UNIT + 1) * UNIT)
    x += row.to(tl.int64) * x_units * UNIT
    y += row.to(tl.int64) * key_units * UNIT
    if MASK != "none":
        mask += mask_row(row, size1, size2, stride0, stride1, stride2) * UNIT
    scores = load_scores(x, mask, columns, loaded, last, scale, MASK, STEP, CAUSAL, "evict_first")
    if MASK == "added":
        factor = LOG2E
    else:
        factor = scale * LOG2E
    terms = tl.exp2((scores - shift_of(tl.max(scores, 1, keep_dims=True))) * factor)
    terms *= over_total(tl.sum(terms, 1, keep_dims=True))
    tl.store(y + columns, terms.to(y.dtype.element_ty), mask=within)


@triton.jit(do_not_specialize=["dy_units", "key_units", "num_rows", "queries"])
def _backward(
    dy,
    y,
    dx,
    scale,
    dy_units,
    key_units,
    num_rows,
    queries,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    keys = key_units * UNIT
    row, query, exists = _place(num_rows, queries, 1, ROWS, False, CAUSAL)
    columns = tl.arange(0, BLOCK)[None, :]
    within = exists & (columns < keys)
    seen, loaded = within, within
    if CAUSAL:
        last = query.to(tl.int32) + keys - queries
        seen = exists & (columns <= last)
        loaded = exists & (columns < (last // UNIT + 1) * UNIT)
    dy += row.to(tl.int64) * dy_units * UNIT
    y += row.to(tl.int64) * key_units * UNIT
    dx += row.to(tl.int64) * key_units * UNIT
    slope = tl.load(dy + columns, mask=loaded, other=0, eviction_policy="evict_first")
    weight = tl.load(y + columns, mask=loaded, other=0, eviction_policy="evict_first")
    slope, weight = slope.to(tl.float32), weight.to(tl.float32)
    if CAUSAL:
        slope = tl.where(seen, slope, 0.0)
    mean = tl.sum(slope * weight, 1, keep_dims=True)
    result = scale * weight * (slope - mean)
    tl.store(dx + columns, result.to(dx.dtype.element_ty), mask=within)
