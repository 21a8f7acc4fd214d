"""Stochastic rounding to bf16 inside a kernel; `megalite_kernels.stochastic` is its definition."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def random_words(key, step, places):
    """Two words of 32 random bits, uint32, for each place: int64, as `key` and `step`."""
    base = _mix((key & 0xFFFFFFFF).to(tl.uint32) ^ _mix((step & 0xFFFFFFFF).to(tl.uint32)))
    other = _mix(((key >> 32) & 0xFFFFFFFF).to(tl.uint32) ^ base)
    first = _mix((places & 0xFFFFFFFF).to(tl.uint32) ^ base)
    first = _mix(first ^ (other + (places >> 32).to(tl.uint32)))
    return first, _mix(first ^ 0x9E3779B9)


@triton.jit
def round_to_bf16(x, bits):
    """fp32 `x` on bf16's grid, up or down by 16 random bits each; still fp32."""
    raised = (x.to(tl.uint32, bitcast=True) + bits) & 0xFFFF0000
    # A NaN whose bits are all ones would be carried to zero.
    return tl.where(x != x, x, raised.to(tl.float32, bitcast=True))


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)
