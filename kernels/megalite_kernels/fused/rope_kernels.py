"""The kernel of `rope.py`, forward and backward, packed or not."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["batch"])
def turn_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    new_q_ptr,
    new_k_ptr,
    new_v_ptr,
    cos_ptr,
    sin_ptr,
    q_stride_s,
    q_stride_b,
    q_stride_n,
    k_stride_s,
    k_stride_b,
    k_stride_n,
    v_stride_s,
    v_stride_b,
    v_stride_n,
    new_q_stride,
    new_k_stride,
    table_stride_s,
    table_stride_b,
    batch,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    REST: tl.constexpr,
    REST_PADDED: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BACKWARDS: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
):
    """One program: a block of one token's query heads and one of its key and value heads."""
    token = tl.program_id(0).to(tl.int64)
    s = token // batch
    b = token % batch
    block = tl.program_id(1)

    pair = tl.arange(0, HALF_PADDED)
    table = s * table_stride_s + b * table_stride_b + pair
    cos = tl.load(cos_ptr + table, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + table, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    if BACKWARDS:
        sin = -sin

    heads = block * Q_BLOCK + tl.arange(0, Q_BLOCK)
    _part(
        q_ptr,
        s * q_stride_s + b * q_stride_b,
        q_stride_n,
        new_q_ptr + token * new_q_stride,
        heads,
        cos,
        sin,
        COUNT=Q_HEADS,
        DIM=DIM,
        DIM_PADDED=DIM_PADDED,
        HALF=HALF,
        HALF_PADDED=HALF_PADDED,
        REST=REST,
        REST_PADDED=REST_PADDED,
        INTERLEAVED=INTERLEAVED,
    )
    heads = block * KV_BLOCK + tl.arange(0, KV_BLOCK)
    _part(
        k_ptr,
        s * k_stride_s + b * k_stride_b,
        k_stride_n,
        new_k_ptr + token * new_k_stride,
        heads,
        cos,
        sin,
        COUNT=KV_HEADS,
        DIM=DIM,
        DIM_PADDED=DIM_PADDED,
        HALF=HALF,
        HALF_PADDED=HALF_PADDED,
        REST=REST,
        REST_PADDED=REST_PADDED,
        INTERLEAVED=INTERLEAVED,
    )
    if new_v_ptr is not None:
        _part(
            v_ptr,
            s * v_stride_s + b * v_stride_b,
            v_stride_n,
            new_v_ptr + token * new_k_stride,
            heads,
            cos,
            sin,
            COUNT=KV_HEADS,
            DIM=DIM,
            DIM_PADDED=DIM_PADDED,
            HALF=0,
            HALF_PADDED=HALF_PADDED,
            REST=DIM,
            REST_PADDED=DIM_PADDED,
            INTERLEAVED=INTERLEAVED,
        )


@triton.jit
def _part(
    x_ptr,
    token,
    stride_n,
    new_ptr,
    heads,
    cos,
    sin,
    COUNT: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    REST: tl.constexpr,
    REST_PADDED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Of these heads turn the first 2 HALF features and copy the REST; all zeros if x is None."""
    real = heads < COUNT
    new_heads = new_ptr + (heads * DIM)[:, None]
    if x_ptr is None:
        feature = tl.arange(0, DIM_PADDED)[None, :]
        zeros = tl.zeros((heads.shape[0], DIM_PADDED), new_ptr.dtype.element_ty)
        tl.store(new_heads + feature, zeros, mask=real[:, None] & (feature < DIM))
    else:
        x_heads = x_ptr + token + (heads.to(tl.int64) * stride_n)[:, None]
        if HALF > 0:
            _turn(x_heads, new_heads, real, cos, sin, HALF, HALF_PADDED, INTERLEAVED)
        if REST > 0:
            feature = tl.arange(0, REST_PADDED)[None, :]
            inside = real[:, None] & (feature < REST)
            feature += 2 * HALF
            x = tl.load(x_heads + feature, mask=inside)
            tl.store(new_heads + feature, x, mask=inside)


@triton.jit
def _turn(
    heads,
    new_heads,
    real,
    cos,
    sin,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Turn the first 2 HALF features of heads at pointers [block, 1] by cos and sin [1, HALF]."""
    dtype = new_heads.dtype.element_ty
    if INTERLEAVED:
        feature = tl.arange(0, 2 * HALF_PADDED)[None, :]
        inside = real[:, None] & (feature < 2 * HALF)
        x = tl.load(heads + feature, mask=inside).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (real.shape[0], HALF_PADDED, 2)))
        y = tl.join(a * cos - b * sin, b * cos + a * sin)
        y = tl.reshape(y, (real.shape[0], 2 * HALF_PADDED))
        tl.store(new_heads + feature, y.to(dtype), mask=inside)
    else:
        feature = tl.arange(0, HALF_PADDED)[None, :]
        inside = real[:, None] & (feature < HALF)
        a = tl.load(heads + feature, mask=inside).to(tl.float32)
        b = tl.load(heads + HALF + feature, mask=inside).to(tl.float32)
        tl.store(new_heads + feature, (a * cos - b * sin).to(dtype), mask=inside)
        tl.store(new_heads + HALF + feature, (b * cos + a * sin).to(dtype), mask=inside)
