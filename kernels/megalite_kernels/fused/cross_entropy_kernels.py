"""The Triton kernels of the cross-entropies that read every logit once, and how each is launched.

A row is walked in tiles [LANES, VECTOR] of which a thread owns whole vectors of 16
bytes. The running maximum and sum of exponentials are kept per lane, not per row: the first walk
then needs no reduction across threads (no barrier, so loads run ahead) until its end, at the price
of one more exponential in VECTOR.

Instructions are nearly as scarce as bandwidth, so exponentials are `exp2`, which is three of them
(subtract, scale, the unit's own) where `exp` is six for the sake of results below 1e-38, and a
tile's columns are compared with the target only in the tile that holds it.

Legend: T rows (tokens), V classes, W columns of the logits, V <= W; M maximum of a row, D sum of
exp(z - M).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

LOWEST: tl.constexpr = tl.constexpr(-2e38)
"""Where a maximum starts: from -inf, lanes that saw only -inf would compute -inf - -inf.

Its product with LOG2E is still a number. A row whose logits are all lower counts as all -inf.
"""

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


class Pass(NamedTuple):
    """How the kernels that read every logit once take a row: columns of a tile, warps."""

    block: int
    num_warps: int


def choose_pass(columns: int, itemsize: int) -> Pass:
    """For statistics: 16 KiB tiles that a program walks, or the whole row if it is smaller."""
    block = max(256, min(16384 // itemsize, triton.next_power_of_2(columns)))
    return Pass(block, max(1, block * itemsize // 4096))


def choose_tile(columns: int, itemsize: int) -> Pass:
    """For the gradient: 8 KiB tiles, a program each, or the whole row if it is smaller."""
    block = max(256, min(8192 // itemsize, triton.next_power_of_2(columns)))
    return Pass(block, max(1, block * itemsize // 1024))


@triton.jit
def tile(LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Columns of a tile: a lane has VECTOR neighbours."""
    return tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def exp(x):
    """Zero below 1e-38."""
    return tl.exp2(x * LOG2E)


@triton.jit
def absorb(z, maximum, exponentials):
    """Online softmax per lane (Milakov and Gimelshein, arXiv:1805.02867)."""
    new = tl.maximum(maximum, tl.max(z, axis=1))
    inside = tl.sum(exp(z - new[:, None]), axis=1)
    return new, exponentials * exp(maximum - new) + inside


@triton.jit
def less_hit(gradient, columns, start, LENGTH: tl.constexpr, target, at_hit):
    """The gradient, in the target's column less `at_hit`, of a tile that begins at `start`."""
    if (target >= start) & (target < start + LENGTH):
        gradient = tl.where(columns == target.to(tl.int32), gradient - at_hit, gradient)
    return gradient


@triton.jit
def row_loss(
    M,
    D,
    at_target,
    total,
    V: tl.constexpr,
    smoothing,
    z_loss,
    SMOOTHED: tl.constexpr,
    SQUARED: tl.constexpr,
):
    """(loss, lse, and lse in fp64); (M - z) first: lse alone would round M and log D together."""
    log_d = tl.log(D)
    loss = (M - at_target) + log_d
    if SMOOTHED:
        loss = (1 - smoothing) * loss + smoothing * ((M - total / V) + log_d)
    lse = M + log_d
    if SQUARED:
        loss += z_loss * lse * lse
    return loss, lse, M.to(tl.float64) + log_d.to(tl.float64)


@triton.jit
def _statistics(
    row_ptr, V: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, SUMMED: tl.constexpr
):
    """(M, D, sum of z) of one row, read once."""
    BLOCK: tl.constexpr = LANES * VECTOR
    offsets = tile(LANES, VECTOR)
    maximum = tl.full([LANES], LOWEST, tl.float32)
    exponentials = tl.zeros([LANES], tl.float32)
    sums = tl.zeros([LANES], tl.float32)
    for start in tl.range(0, V // BLOCK * BLOCK, BLOCK):
        z = tl.load(row_ptr + start + offsets, eviction_policy="evict_first").to(tl.float32)
        maximum, exponentials = absorb(z, maximum, exponentials)
        if SUMMED:
            sums += tl.sum(z, axis=1)
    if V % BLOCK:
        columns = V // BLOCK * BLOCK + offsets
        inside = columns < V
        z = tl.load(row_ptr + columns, mask=inside, other=-float("inf")).to(tl.float32)
        maximum, exponentials = absorb(z, maximum, exponentials)
        if SUMMED:
            sums += tl.sum(tl.where(inside, z, 0.0), axis=1)
    M = tl.max(maximum, axis=0)
    return M, tl.sum(exponentials * exp(maximum - M), axis=0), tl.sum(sums, axis=0)


@triton.jit(do_not_specialize=["ignore_index"])
def loss_kernel(
    logits_ptr,
    target_ptr,
    loss_ptr,
    log_sum_ptr,
    logits_stride,
    ignore_index,
    smoothing,
    z_loss,
    V: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    SMOOTHED: tl.constexpr,
    SQUARED: tl.constexpr,
):
    """A row's loss, NaN if its target is no class and not ignored, and lse."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    target = tl.load(target_ptr + row)
    counts = target != ignore_index
    exists = (target >= 0) & (target < V)
    at_target = tl.load(row_ptr + target, mask=exists, other=float("nan")).to(tl.float32)
    M, D, total = _statistics(row_ptr, V, LANES, VECTOR, SMOOTHED)
    smoothing = tl.full([], smoothing, tl.float32)
    z_loss = tl.full([], z_loss, tl.float32)
    arguments = (M, D, at_target, total, V, smoothing, z_loss, SMOOTHED, SQUARED)
    loss, _, log_sum = row_loss(*arguments)
    tl.store(loss_ptr + row, tl.where(counts, loss, 0.0))
    tl.store(log_sum_ptr + row, log_sum)


@triton.jit(do_not_specialize=["first_column"])
def statistics_kernel(
    logits_ptr,
    target_ptr,
    statistics_ptr,
    logits_stride,
    first_column,
    V: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    SUMMED: tl.constexpr,
):
    """A row's (M, D, target's logit, sum of logits, or 0) on these columns."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    target = tl.load(target_ptr + row) - first_column
    here = (target >= 0) & (target < V)
    at_target = tl.load(row_ptr + target, mask=here, other=0.0).to(tl.float32)
    M, D, total = _statistics(row_ptr, V, LANES, VECTOR, SUMMED)
    out_ptr = statistics_ptr + row * 4
    tl.store(out_ptr, M)
    tl.store(out_ptr + 1, D)
    tl.store(out_ptr + 2, at_target)
    tl.store(out_ptr + 3, total)


@triton.jit(do_not_specialize=["first_column", "ignore_index"])
def gradient_kernel(
    logits_ptr,
    out_ptr,
    target_ptr,
    log_sum_ptr,
    gradient_ptr,
    logits_stride,
    out_stride,
    first_column,
    ignore_index,
    smoothing,
    z_loss,
    V: tl.constexpr,
    W: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`out` may be `logits`: every column is read and written by one program, once."""
    program = tl.program_id(0)
    blocks: tl.constexpr = (W + BLOCK - 1) // BLOCK
    row = (program // blocks).to(tl.int64)
    start = (program % blocks) * BLOCK
    columns = start + tl.arange(0, BLOCK)
    z = tl.load(logits_ptr + row * logits_stride + columns, mask=columns < V, other=-float("inf"))
    target = tl.load(target_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    gradient = tl.load(gradient_ptr + row).to(tl.float32)
    gradient = tl.where(target == ignore_index, 0.0, gradient)
    smoothing = tl.full([], smoothing, tl.float32)
    z_loss = tl.full([], z_loss, tl.float32)
    coarse = log_sum.to(tl.float32)
    fine = (log_sum - coarse.to(log_sum.dtype)).to(tl.float32)
    p = exp(z.to(tl.float32) - coarse - fine)
    result = p * (1 + 2 * z_loss * coarse) - smoothing / CLASSES
    result = gradient * less_hit(
        result, columns, start, BLOCK, target - first_column, 1 - smoothing
    )
    result = tl.where(columns < V, result, 0.0)
    # Not a product by zero: what is masked may be NaN.
    result = tl.where(gradient == 0.0, 0.0, result)
    tl.store(out_ptr + row * out_stride + columns, result, mask=columns < W)
