"""The Triton kernels of RMSNorm: forward with or without a residual's sum, and backward.

Both work on tiles of ROWS whole rows, BLOCK (a power of two) columns wide. A program of the forward
takes one tile, for the next program's loads hide its latency better than loading ahead in a walk
did. One of the backward walks over many tiles, so that few rows of the weight's gradient are left
to sum; it takes every n-th one, so that all programs are in the same stretch of memory: 1 to 5%
faster than a stretch for each.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x,
    residual,
    weight,
    y,
    new_residual,
    rstd,
    x_stride,
    residual_stride,
    rows,
    eps,
    width: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CASTING: tl.constexpr,
):
    """y and rstd, and with a residual its sum with x; x and residual have a stride over rows."""
    masked: tl.constexpr = ROWS > 1 or width != BLOCK
    columns = tl.arange(0, BLOCK)[None, :]
    w = _load(weight + columns, columns < width, width != BLOCK, "").to(tl.float32)
    if CASTING == "gemma":
        w += 1.0
    start = tl.program_id(0).to(tl.int64) * ROWS
    row = start + tl.arange(0, ROWS)[:, None]
    mask = (row < rows) & (columns < width)
    from_x = _tile(x, start, x_stride, columns, ROWS)
    value = _load(from_x, mask, masked, "").to(tl.float32)
    if residual is not None:
        from_residual = _tile(residual, start, residual_stride, columns, ROWS)
        other = _load(from_residual, mask, masked, "")
        total = (value + other.to(tl.float32)).to(new_residual.dtype.element_ty)
        _store(_tile(new_residual, start, width, columns, ROWS), total, mask, masked)
        value = total.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1, keep_dims=True) / width + eps)
    tl.store(rstd + row, inverse, mask=row < rows)
    normed = value * inverse
    if CASTING == "llama":
        normed = normed.to(y.dtype.element_ty).to(tl.float32)
    normed = (normed * w).to(y.dtype.element_ty)
    _store(_tile(y, start, width, columns, ROWS), normed, mask, masked)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    dy,
    dresidual,
    x,
    weight,
    rstd,
    dx,
    dx_too,
    partials,
    dy_stride,
    dresidual_stride,
    x_stride,
    rows,
    width: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    READS: tl.constexpr,
    KEEPS_WEIGHT: tl.constexpr,
    EARLY: tl.constexpr,
    CASTING: tl.constexpr,
):
    """dx, and in `partials` each program's part of the weight's gradient.

    With xhat = x * rstd and g = dy * w:  dx = (g - xhat * mean(g * xhat)) * rstd + dresidual. The
    rounding of "llama" counts as identity, and the weight's gradient is of the unrounded xhat,
    which is nearer to the exact one. READS says how a tile comes: "staged" (through shared memory,
    two tiles ahead), "ahead" (the next tile into registers before this tile's arithmetic) or
    "twice" (again, from a cache, after the sum, to need fewer registers). EARLY lets the kernel
    that sums `partials` start as soon as programs finish; it waits for all of them by itself.
    """
    masked: tl.constexpr = ROWS > 1 or width != BLOCK
    partly: tl.constexpr = width != BLOCK
    stages: tl.constexpr = 3 if READS == "staged" else 1
    policy: tl.constexpr = "evict_last" if READS == "twice" else ""
    columns = tl.arange(0, BLOCK)[None, :]
    in_width = columns < width
    if KEEPS_WEIGHT:
        w = _load(weight + columns, in_width, partly, "")
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    tiles = tl.cdiv(rows, ROWS)

    start = program.to(tl.int64) * ROWS
    row = start + tl.arange(0, ROWS)[:, None]
    inverse_next = tl.load(rstd + row, mask=row < rows, other=0.0)
    if READS == "ahead":
        mask = (row < rows) & in_width
        dy_next = _load(_tile(dy, start, dy_stride, columns, ROWS), mask, masked, "")
        x_next = _load(_tile(x, start, x_stride, columns, ROWS), mask, masked, "")
        if dresidual is not None:
            from_residual = _tile(dresidual, start, dresidual_stride, columns, ROWS)
            dresidual_next = _load(from_residual, mask, masked, "")

    for tile in tl.range(program, tiles, programs, num_stages=stages):
        start = tl.full((), tile, tl.int64) * ROWS  # no `.to`: an int in the interpreter
        mask = (start + tl.arange(0, ROWS)[:, None] < rows) & in_width
        inverse = inverse_next
        # The last step reads its own tile again: cheaper than a condition on every load.
        ahead = tl.where(tile + programs < tiles, tile + programs, tile).to(tl.int64) * ROWS
        row_ahead = ahead + tl.arange(0, ROWS)[:, None]
        inverse_next = tl.load(rstd + row_ahead, mask=row_ahead < rows, other=0.0)
        if READS == "ahead":
            dy_now = dy_next
            x_now = x_next
            mask_ahead = (row_ahead < rows) & in_width
            dy_next = _load(_tile(dy, ahead, dy_stride, columns, ROWS), mask_ahead, masked, "")
            x_next = _load(_tile(x, ahead, x_stride, columns, ROWS), mask_ahead, masked, "")
            if dresidual is not None:
                more = dresidual_next
                from_residual = _tile(dresidual, ahead, dresidual_stride, columns, ROWS)
                dresidual_next = _load(from_residual, mask_ahead, masked, "")
        else:
            dy_now = _load(_tile(dy, start, dy_stride, columns, ROWS), mask, masked, policy)
            x_now = _load(_tile(x, start, x_stride, columns, ROWS), mask, masked, policy)
            if dresidual is not None:
                from_residual = _tile(dresidual, start, dresidual_stride, columns, ROWS)
                more = _load(from_residual, mask, masked, "")
        if not KEEPS_WEIGHT:
            w = _load(weight + columns, in_width, partly, "")
        scale = w.to(tl.float32)
        if CASTING == "gemma":
            scale += 1.0

        slope = dy_now.to(tl.float32)
        xhat = x_now.to(tl.float32) * inverse
        mean = tl.sum(slope * scale * xhat, axis=1, keep_dims=True) / width
        if READS == "twice":
            # Another eviction policy keeps the compiler from taking these for the loads above.
            dy_now = _load(_tile(dy, start, dy_stride, columns, ROWS), mask, masked, "evict_first")
            x_now = _load(_tile(x, start, x_stride, columns, ROWS), mask, masked, "evict_first")
            slope = dy_now.to(tl.float32)
            xhat = x_now.to(tl.float32) * inverse
        dw += slope * xhat
        gradient = (slope * scale - xhat * mean) * inverse
        if dresidual is not None:
            gradient += more.to(tl.float32)
        into = _tile(dx, start, width, columns, ROWS)
        _store(into, gradient.to(dx.dtype.element_ty), mask, masked)
        if dx_too is not None:
            into_too = _tile(dx_too, start, width, columns, ROWS)
            _store(into_too, gradient.to(dx_too.dtype.element_ty), mask, masked)

    if EARLY:
        gdc_launch_dependents()
    total = tl.sum(dw, axis=0, keep_dims=True)
    part = partials + tl.program_id(0).to(tl.int64) * width + columns
    _store(part, total, in_width, partly)


@triton.jit
def _tile(base, start, stride, columns, ROWS: tl.constexpr):
    """Pointers to ROWS rows from row `start` on; offsets of 64 bits, `start` being one."""
    inside = tl.arange(0, ROWS)[:, None].to(tl.int64)
    return base + start * stride + (inside * stride + columns)


@triton.jit
def _load(pointers, mask, MASKED: tl.constexpr, EVICTION: tl.constexpr):
    if MASKED:
        value = tl.load(pointers, mask=mask, other=0.0, eviction_policy=EVICTION)
    else:
        value = tl.load(pointers, eviction_policy=EVICTION)
    return value


@triton.jit
def _store(pointers, value, mask, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointers, value, mask=mask)
    else:
        tl.store(pointers, value)
