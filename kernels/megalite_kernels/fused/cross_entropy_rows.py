"""The Triton kernels that make a row's loss and its gradient, over the logits, in one launch.

Programs are few and take many rows. A program asks for what it needs next before it works on what
it has: the next row, or the next tile of a row. Without that an H200 reached 62% of a copy's
bandwidth at 32,000 classes, with it 85%: a row that fills a multiprocessor's registers leaves no
other program there to read while this one computes.

Legend: T rows (tokens), V classes, W columns of the logits, V <= W; M maximum of a row, D sum of
exp(z - M).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from megalite_kernels.fused.cross_entropy_kernels import (
    LOWEST,
    absorb,
    exp,
    less_hit,
    row_loss,
    tile,
)


class Walk(NamedTuple):
    """How rows are taken.

    Attributes:
        block: columns of a tile. A row that fits into one is held in registers, a longer one is
            read twice: from memory, and then from the L2 cache but for its last tile.
        num_warps: of a program.
        programs: per multiprocessor: so few that the rows in flight stay in the L2 cache.
        registers: of a thread at most: fewer let more programs share a multiprocessor.
    """

    block: int
    num_warps: int
    programs: int
    registers: int


def choose_walk(columns: int, itemsize: int) -> Walk:
    """What measured fastest on an H200, by the bytes of a row."""
    size = columns * itemsize
    if size <= 65536:
        block = max(1024, triton.next_power_of_2(columns))
        num_warps = max(4, block * itemsize // 4096)
        return Walk(block, num_warps, 16 // num_warps, 128)
    if size <= 131072:
        return Walk(16384 // itemsize, 8, 3, 80)
    if size <= 262144:
        return Walk(16384 // itemsize, 16, 2, 64)
    return Walk(32768 // itemsize, 16, 2, 64)


@triton.jit
def _finish(
    row,
    loss_ptr,
    part_ptr,
    counts,
    weight,
    M,
    D,
    at_target,
    total,
    smoothing,
    z_loss,
    V: tl.constexpr,
    SMOOTHED: tl.constexpr,
    SQUARED: tl.constexpr,
):
    """Store a row's losses; (factor of exp(z - M), what is taken everywhere, what of the target).

    These three make the gradient.
    """
    loss, lse, _ = row_loss(M, D, at_target, total, V, smoothing, z_loss, SMOOTHED, SQUARED)
    loss = tl.where(counts, loss, 0.0)
    tl.store(loss_ptr + row, loss)
    tl.store(part_ptr + row, weight * tl.where(weight == 0.0, 0.0, loss))
    scale = weight / D
    if SQUARED:
        scale *= 1 + 2 * z_loss * lse
    at_hit = weight
    if SMOOTHED:
        at_hit *= 1 - smoothing
    return scale, weight * smoothing / V, at_hit


@triton.jit
def _store_zeros(row_ptr, first, W: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Zeros from column `first` on.

    In half tiles: the compiler unrolls a loop of few steps, and holds its addresses all along.
    """
    PART: tl.constexpr = LANES // 2
    columns = tile(PART, VECTOR)
    for start in tl.range(first, W, PART * VECTOR):
        zeros = tl.zeros([PART, VECTOR], tl.float32)
        mask = start + columns < W
        tl.store(row_ptr + start + columns, zeros, mask=mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def held_rows_kernel(
    logits_ptr,
    out_ptr,
    target_ptr,
    weight_ptr,
    part_ptr,
    loss_ptr,
    rows,
    logits_stride,
    out_stride,
    ignore_index,
    smoothing,
    z_loss,
    V: tl.constexpr,
    W: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    SMOOTHED: tl.constexpr,
    SQUARED: tl.constexpr,
):
    """Losses, weighted losses and, in `out`, which may be `logits`, their gradient.

    A target that is no class and not ignored makes its loss NaN.

    A row is read once; each exponential is made once. `LANES * VECTOR >= V`.
    """
    BLOCK: tl.constexpr = LANES * VECTOR
    columns = tile(LANES, VECTOR)
    inside = columns < V
    smoothing = tl.full([], smoothing, tl.float32)
    z_loss = tl.full([], z_loss, tl.float32)
    first = tl.program_id(0)
    ahead = tl.load(
        logits_ptr + tl.cast(first, tl.int64) * logits_stride + columns,
        mask=inside,
        other=-float("inf"),
        eviction_policy="evict_first",
    )
    for index in tl.range(first, rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        z = ahead.to(tl.float32)
        target = tl.load(target_ptr + row)
        # Before any store to the row: the reductions' barriers lie between.
        exists = (target >= 0) & (target < V)
        at_target = tl.load(
            logits_ptr + row * logits_stride + target, mask=exists, other=float("nan")
        )
        counts = target != ignore_index
        weight = tl.where(counts, tl.load(weight_ptr + row).to(tl.float32), 0.0)
        # Half the registers of an int64, through two reductions that leave none to spare.
        hit = target.to(tl.int32)
        after = tl.cast(index + tl.num_programs(0), tl.int64)
        ahead = tl.load(
            logits_ptr + after * logits_stride + columns,
            mask=tl.where(after < rows, inside, False),
            other=-float("inf"),
            eviction_policy="evict_first",
        )
        M = tl.maximum(tl.max(tl.max(z, axis=1), axis=0), LOWEST)
        total = 0.0
        if SMOOTHED:
            total = tl.sum(tl.sum(tl.where(inside, z, 0.0), axis=1), axis=0)
        powers = exp(z - M)
        D = tl.sum(tl.sum(powers, axis=1), axis=0)
        scale, everywhere, at_hit = _finish(
            row,
            loss_ptr,
            part_ptr,
            counts,
            weight,
            M,
            D,
            at_target.to(tl.float32),
            total,
            smoothing,
            z_loss,
            V,
            SMOOTHED,
            SQUARED,
        )
        out_row_ptr = out_ptr + row * out_stride
        if weight == 0.0:
            # Not products by zero: what is masked may be NaN.
            _store_zeros(out_row_ptr, 0, W, LANES, VECTOR)
        else:
            # A product of two vectors: comparing every column with the target is dearer.
            lane = tl.where(tl.arange(0, LANES) == hit // VECTOR, -at_hit, 0.0)
            place = tl.where(tl.arange(0, VECTOR) == hit % VECTOR, 1.0, 0.0)
            gradient = powers * scale + lane[:, None] * place[None, :]
            if SMOOTHED:
                gradient -= everywhere
            if W > V:
                gradient = tl.where(inside, gradient, 0.0)
            mask = columns < W
            tl.store(out_row_ptr + columns, gradient, mask=mask, eviction_policy="evict_first")
            _store_zeros(out_row_ptr, BLOCK, W, LANES, VECTOR)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def walked_rows_kernel(
    logits_ptr,
    out_ptr,
    target_ptr,
    weight_ptr,
    part_ptr,
    loss_ptr,
    rows,
    logits_stride,
    out_stride,
    ignore_index,
    smoothing,
    z_loss,
    V: tl.constexpr,
    W: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    SMOOTHED: tl.constexpr,
    SQUARED: tl.constexpr,
):
    """As `held_rows_kernel`, of rows longer than a tile: `LANES * VECTOR < V`.

    The last tile, columns [HEAD, V), is read once and kept; [0, HEAD) are read twice, the second
    time from the end, because what was read last is what the cache surely holds.
    """
    BLOCK: tl.constexpr = LANES * VECTOR
    HEAD: tl.constexpr = (V - 1) // BLOCK * BLOCK
    offsets = tile(LANES, VECTOR)
    last = HEAD + offsets
    inside = last < V
    smoothing = tl.full([], smoothing, tl.float32)
    z_loss = tl.full([], z_loss, tl.float32)
    for index in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        row_ptr = logits_ptr + row * logits_stride
        out_row_ptr = out_ptr + row * out_stride
        target = tl.load(target_ptr + row)
        exists = (target >= 0) & (target < V)
        # Before any store to the row: the reductions' barriers lie between.
        at_target = tl.load(row_ptr + target, mask=exists, other=float("nan")).to(tl.float32)
        counts = target != ignore_index
        weight = tl.where(counts, tl.load(weight_ptr + row).to(tl.float32), 0.0)
        maximum = tl.full([LANES], LOWEST, tl.float32)
        exponentials = tl.zeros([LANES], tl.float32)
        sums = tl.zeros([LANES], tl.float32)
        ahead = tl.load(row_ptr + offsets, eviction_policy="evict_last")
        for start in tl.range(BLOCK, HEAD, BLOCK):
            z = ahead.to(tl.float32)
            ahead = tl.load(row_ptr + start + offsets, eviction_policy="evict_last")
            maximum, exponentials = absorb(z, maximum, exponentials)
            if SMOOTHED:
                sums += tl.sum(z, axis=1)
        end = tl.load(
            row_ptr + last, mask=inside, other=-float("inf"), eviction_policy="evict_first"
        ).to(tl.float32)
        z = ahead.to(tl.float32)
        maximum, exponentials = absorb(z, maximum, exponentials)
        M = tl.maximum(tl.max(tl.max(end, axis=1), axis=0), tl.max(maximum, axis=0))
        kept = exp(end - M)
        D = tl.sum(tl.sum(kept, axis=1), axis=0)
        D += tl.sum(exponentials * exp(maximum - M), axis=0)
        total = 0.0
        if SMOOTHED:
            sums += tl.sum(z, axis=1) + tl.sum(tl.where(inside, end, 0.0), axis=1)
            total = tl.sum(sums, axis=0)
        scale, everywhere, at_hit = _finish(
            row,
            loss_ptr,
            part_ptr,
            counts,
            weight,
            M,
            D,
            at_target,
            total,
            smoothing,
            z_loss,
            V,
            SMOOTHED,
            SQUARED,
        )
        if weight == 0.0:
            # Not products by zero: what is masked may be NaN.
            _store_zeros(out_row_ptr, 0, W, LANES, VECTOR)
        else:
            ahead = tl.load(row_ptr + HEAD - BLOCK + offsets, eviction_policy="evict_first")
            ending = kept * scale
            if SMOOTHED:
                ending -= everywhere
            ending = less_hit(ending, last, HEAD, BLOCK, target, at_hit)
            if W > V:
                ending = tl.where(inside, ending, 0.0)
            tl.store(out_row_ptr + last, ending, mask=last < W, eviction_policy="evict_first")
            for back in tl.range(BLOCK, HEAD + BLOCK, BLOCK):
                start = HEAD - back
                again = ahead.to(tl.float32)
                # The last step reads its own tile again: cheaper than a condition on every load.
                before = tl.maximum(start - BLOCK, 0)
                ahead = tl.load(row_ptr + before + offsets, eviction_policy="evict_first")
                gradient = exp(again - M) * scale
                if SMOOTHED:
                    gradient -= everywhere
                columns = start + offsets
                gradient = less_hit(gradient, columns, start, BLOCK, target, at_hit)
                tl.store(out_row_ptr + columns, gradient, eviction_policy="evict_first")
            _store_zeros(out_row_ptr, HEAD + BLOCK, W, LANES, VECTOR)
