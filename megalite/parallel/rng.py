"""Random numbers that do not depend on the layout: a value is a function of its name and place.

A *key* is 64 bits hashed from names and numbers (the seed, a tensor's name, a step, a layer); the
value at element i is `mix(key + (i + 1) * golden)`, the i-th output of SplitMix64 (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", 2014) started at `key`. So a rank draws its
own slice of a weight, or its own part of a dropout mask, and all layouts see the same whole.

Integers wrap as two's complement, and the normal quantile is made of correctly rounded operations
only (+, *, /), so that a value does not depend on its position in a vector register, on the number
of threads, or on the device, as the libraries' `log`, `cos` and even `sqrt` do (7 in 1,000 square
roots of fp64 numbers were seen to differ in the last bit between a CPU and an H100).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_CHUNK = 1 << 20
"""Elements drawn at a time: about twenty int64 and fp64 temporaries of this size stay in cache."""


def make_key(*parts: int | str) -> int:
    """A 64-bit key from names and numbers, as a signed integer for int64 tensors."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def random_bits(key: int, index: Tensor) -> Tensor:
    """64 random bits for each element.

    Args:
        key: see `make_key`.
        index: int64, any shape: the element's place in the whole tensor.

    Returns:
        int64, shape of `index`; all 64 bits are uniform.
    """
    return _mix((index + 1) * _signed(_GOLDEN) + key)


def uniform(key: int, index: Tensor) -> Tensor:
    """Uniform values strictly between 0 and 1, fp64, shape of `index`: (k + 1/2) / 2^52."""
    return (_shift_right(random_bits(key, index), 12).double() + 0.5) * 2.0**-52


def normal(key: int, index: Tensor) -> Tensor:
    """Standard normal values, fp64, shape of `index`."""
    return normal_quantile(uniform(key, index))


def keep_mask(key: int, index: Tensor, drop: float) -> Tensor:
    """True with probability 1 - `drop`, for dropout. Bool, shape of `index`."""
    return _shift_right(random_bits(key, index), 32) >= round(drop * 2.0**32)


def normal_slice(
    key: int,
    shape: tuple[int, int],
    rows: range,
    columns: range,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A block of the [shape] matrix of standard normal values with this key.

    Only the block is drawn. Returns fp64 [len(rows), len(columns)].
    """
    out = torch.empty(len(rows), len(columns), dtype=torch.float64, device=device)
    if not out.numel():
        return out
    column = torch.arange(columns.start, columns.stop, device=device)
    rows_at_once = max(1, _CHUNK // len(columns))
    for first in range(0, len(rows), rows_at_once):
        row = torch.arange(rows.start, rows.stop, device=device)[first : first + rows_at_once]
        out[first : first + rows_at_once] = normal(key, row[:, None] * shape[1] + column)
    return out


def normal_quantile(p: Tensor) -> Tensor:
    """Inverse of the standard normal distribution function, relative error below 1e-6.

    Wichura, "Algorithm AS 241: The percentage points of the normal distribution", 1988, PPND7.

    Args:
        p: fp64 in (0, 1).
    """
    q = p - 0.5
    r = 0.180625 - q * q
    central = (
        q
        * _polynomial(r, 3.3871327179, 50.434271938, 159.29113202, 59.109374720)
        / _polynomial(r, 1.0, 17.895169469, 78.757757664, 67.187563600)
    )
    s = _sqrt(-_log(torch.minimum(p, 1.0 - p)))
    near, far = s - 1.6, s - 5.0
    tail = torch.where(
        s <= 5.0,
        _polynomial(near, 1.4234372777, 2.7568153900, 1.3067284816, 0.17023821103)
        / _polynomial(near, 1.0, 0.73700164250, 0.12021132975),
        _polynomial(far, 6.6579051150, 3.0812263860, 0.42868294337, 0.017337203997)
        / _polynomial(far, 1.0, 0.24197894225, 0.012258202635),
    )
    return torch.where(q.abs() <= 0.425, central, torch.where(q < 0, -tail, tail))


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of fp64 x > 0 from correctly rounded operations, error below 1e-9.

    x = m 2^e with m in [1/2, 1); log m = 2 atanh(t) with t = (m - c) / (m + c) about c = 0.7.
    """
    mantissa, exponent = torch.frexp(x)
    t = (mantissa - 0.7) / (mantissa + 0.7)
    t2 = t * t
    series = _polynomial(t2, 1.0, 1 / 3, 1 / 5, 1 / 7, 1 / 9, 1 / 11, 1 / 13)
    # log 2, and log 0.7
    return exponent.double() * 0.6931471805599453 + (2.0 * t * series - 0.35667494393873245)


def _sqrt(x: Tensor) -> Tensor:
    """Square root of fp64 x in [1/2, 40] by Newton's iteration, error below 1e-14."""
    root = 1.0 + 0.25 * x
    for _ in range(6):
        root = 0.5 * (root + x / root)
    return root


def _polynomial(x: Tensor, *coefficients: float) -> Tensor:
    """Horner's scheme, lowest power first; each operation is its own kernel, so none is fused."""
    result = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + coefficient
    return result


def _mix(x: Tensor) -> Tensor:
    """Finalizer of SplitMix64."""
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64 (torch's own shift copies the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
