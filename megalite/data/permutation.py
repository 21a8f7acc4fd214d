"""A pseudo-random order as a formula: no table, no state, any position by itself.

`permute(index, size, seed, epoch)` is a bijection of [0, size). It is a Feistel network on the
smallest power of four that covers `size`; values that land outside are sent through again until
they land inside ("cycle walking"; Black and Rogaway, "Ciphers with arbitrary finite domains",
2002). The rounds' function is the finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 6
_MASK64 = (1 << 64) - 1


def permute(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Images of the positions.

    Args:
        index: int64 positions in [0, size), any shape.
        size: how many there are.
        seed, epoch: choose the order.

    Returns:
        int64, shape of `index`; over all positions every value of [0, size) appears once.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = [_mix_int(seed * 0x9E3779B97F4A7C15 + epoch * _ROUNDS + i) for i in range(_ROUNDS)]
    values = np.asarray(index).astype(np.uint64).reshape(-1)
    values = _feistel(values, half_bits, keys)
    while (outside := values >= np.uint64(size)).any():
        values[outside] = _feistel(values[outside], half_bits, keys)
    return values.astype(np.int64).reshape(np.shape(index))


def _feistel(values: np.ndarray, half_bits: int, keys: list[int]) -> np.ndarray:
    bits = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ np.uint64(key)) & mask)
    return (left << bits) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """Finalizer of SplitMix64 on uint64 (arithmetic wraps)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix_int(x: int) -> int:
    return int(_mix(np.array([x & _MASK64], np.uint64))[0])
