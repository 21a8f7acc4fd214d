"""Which dataset of a blend gives each sample: Megatron-LM's greedy interleave.

At sample i the dataset is taken whose share so far falls most short of its weight, the largest

    weight[k] x max(i, 1) - used[k]

and of equal ones the first. Nothing is random, and sample i depends on those before it alone: a
longer run continues a shorter one. Where each dataset has a size, one that is used up is left out,
and the whole interleave takes each of its samples once.

Source of the method: Megatron-LM, `megatron/core/datasets/helpers.cpp`, `build_blending_indices`
and `build_exhaustive_blending_indices`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

MOST_DATASETS = np.iinfo(np.int16).max
"""Numbers of datasets are stored as int16."""

WORTH_COMPILING = 2_000_000
"""Samples that plain Python takes as long for as numba for importing and compiling, about 2 s."""

_UNLIMITED = np.iinfo(np.int64).max


class Greedy:
    """The interleave, as far as one asks.

    Args:
        weights: of each dataset, above zero; only their ratios count.
        sizes: samples that each dataset has in all; None: they never end.
        used: samples of each that were taken already; None: none.
        compiled: of `compiler`; None: plain Python, with the same result.
    """

    def __init__(
        self,
        weights: Sequence[float],
        sizes: Sequence[int] | None = None,
        used: Sequence[int] | None = None,
        compiled: Callable[..., None] | None = None,
    ):
        self.weights = normalized(weights)
        self.sizes = list(sizes) if sizes is not None else [_UNLIMITED] * len(self.weights)
        self.used = list(used) if used is not None else [0] * len(self.weights)
        self._compiled = compiled

    def extend(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The next so many samples.

        Returns:
            int16 [count], the dataset of each; int64 [count], its number within that dataset.
        """
        first = sum(self.used)
        left = sum(size - taken for size, taken in zip(self.sizes, self.used, strict=True))
        assert count <= left, f"{count} samples of {left}"
        datasets, samples = np.empty(count, np.int16), np.empty(count, np.int64)
        if self._compiled is None:
            _interleave(self.weights, self.sizes, self.used, first, datasets, samples)
            return datasets, samples
        used = np.array(self.used, np.int64)
        weights, sizes = np.array(self.weights), np.array(self.sizes, np.int64)
        self._compiled(weights, sizes, used, first, datasets, samples)
        self.used = used.tolist()
        return datasets, samples


def normalized(weights: Sequence[float]) -> list[float]:
    """The weights over their sum, rounded as numpy rounds."""
    array = np.array(weights, np.float64)
    return (array / array.sum()).tolist()


def compiler() -> Callable[..., None] | None:
    """The loop, compiled by numba; None if numba is not installed."""
    if find_spec("numba") is None:
        return None
    import numba

    return numba.njit(_interleave)


def _interleave(
    weights: Any, sizes: Any, used: Any, first: int, datasets: np.ndarray, samples: np.ndarray
) -> None:
    """Fill the arrays from sample `first` on. Plain enough for a compiler, and fast with lists."""
    for row in range(len(datasets)):
        place = max(first + row, 1)
        best, most = -1, -np.inf
        for k in range(len(weights)):
            short = weights[k] * place - used[k]
            if short > most and used[k] < sizes[k]:
                best, most = k, short
        datasets[row] = best
        samples[row] = used[best]
        used[best] += 1
