"""Rounding to bf16 up or down by chance, so that it is right on average.

A value that moves by less than half a step of bf16, 2^-9 of its size, never moves when it is
rounded to the nearest. Rounded up with the probability of how far it is on the way, it moves as
often as it should. The random numbers are a function of (key, step, place) alone, so that the same
step rounds alike wherever and however often it is taken. `fused/stochastic.py` is this in Triton.

Sources: Gupta et al., "Deep learning with limited numerical precision", arXiv:1502.02551; the
mixing function is "lowbias32" of Wellons, "Prospecting for hash functions", 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def random_words(key: int, step: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Two words of 32 random bits for each place.

    Args:
        key: 64 bits, signed: whose numbers these are.
        step: one element, a whole number below 2^24 of any dtype.
        places: int64, at least 0.

    Returns:
        Two int64 tensors, shape of `places`, from 0 to 2^32 - 1.
    """
    base = _mix((key & _WORD) ^ _mix(step.long().view(()) & _WORD))
    other = _mix(((key >> 32) & _WORD) ^ base)
    first = _mix((places & _WORD) ^ base)
    first = _mix(first ^ ((other + (places >> 32)) & _WORD))
    return first, _mix(first ^ 0x9E3779B9)


def round_to_bf16(x: Tensor, bits: Tensor) -> Tensor:
    """Round stochastically; bf16, shape of `x`.

    Args:
        x: fp32. What bf16 holds stays as it is, infinities and NaN among them.
        bits: of 16 random bits each, shape of `x`, any integer dtype.
    """
    # Magnitudes in steps of fp32: a carry out of the lower 16 bits is a step of bf16.
    raised = (x.view(torch.int32) + bits.int()) & -0x10000
    return torch.where(x.isnan(), x, raised.view(torch.float32)).bfloat16()


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32 bits in which each bit of the input flips about half of the output's."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)
