"""The valid choices nearest to a number, in words. No torch import."""

from __future__ import annotations

SEARCHED = 1000
"""Divisors are searched so far from a value, from 1 and from the number."""


def near_divisors(number: int, value: int) -> str:
    """The divisors of a number nearest to a value, in words."""
    far = [*range(1, SEARCHED), *(number // n for n in range(1, SEARCHED))]
    around = range(max(1, value - SEARCHED), value + SEARCHED)
    return near(sorted({n for n in (*far, *around) if n and number % n == 0}), value)


def near(choices: list[int], value: int) -> str:
    """The valid choices nearest to the value, in words."""
    nearest = sorted(sorted(choices, key=lambda n: abs(n - value))[:4])
    return f"; try {', '.join(map(str, nearest))}"


def near_multiples(value: int, unit: int) -> str:
    """The multiples of a unit around a value, in words."""
    below = value // unit * unit
    choices = [n for n in (below, below + unit) if n]
    return f"; try {' or '.join(map(str, choices))}"
