"""Megatron-LM's order of samples as its documentation of semantics says it, in plain loops."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def plan(tokens_per_epoch: int, num_samples: int | None, seq: int) -> tuple[int, bool, int]:
    """(epochs, whether the final one is separate, samples before it)."""
    epochs = 1
    while num_samples is not None and epochs * tokens_per_epoch < num_samples * seq + 1:
        epochs += 1
    if epochs == 1:
        return 1, False, 0
    sans = ((epochs - 1) * tokens_per_epoch - 1) // seq
    last = num_samples - sans
    per = (tokens_per_epoch - 1) // seq
    return epochs, last < int(0.80 * per), sans


def documents(
    indices: Sequence[int], epochs: int, separate: bool, random: np.random.RandomState
) -> list[int]:
    """The document index."""
    if separate:
        return [
            *documents(indices, epochs - 1, False, random),
            *documents(indices, 1, False, random),
        ]
    flat = np.array([index for _ in range(epochs) for index in indices], np.int32)
    random.shuffle(flat)
    return flat.tolist()


def samples(lengths: Sequence[int], docs: Sequence[int], count: int, seq: int) -> list[list[int]]:
    """The sample index: walk through the documents, a sample is `seq + 1` tokens, one is shared."""
    rows, position, offset = [[0, 0]], 0, 0
    while len(rows) <= count:
        remaining = seq + 1
        while remaining:
            there = lengths[docs[position]] - offset
            remaining -= there
            if remaining <= 0:
                offset += remaining + there - 1
                remaining = 0
            else:
                position, offset = position + 1, 0
        rows.append([position, offset])
    return rows


def shuffle(together: int, total: int, random: np.random.RandomState) -> list[int]:
    """The shuffle index: `[0, together)` and the rest apart."""
    first = np.arange(together, dtype=np.uint32)
    random.shuffle(first)
    rest = np.arange(together, total, dtype=np.uint32)
    if len(rest):
        random.shuffle(rest)
    return [*first.tolist(), *rest.tolist()]


def indices(
    lengths: Sequence[int], begin: int, end: int, num_samples: int | None, seq: int, seed: int
) -> tuple[list[int], list[list[int]], list[int]]:
    """(document, sample, shuffle) index."""
    random = np.random.RandomState(seed)
    tokens = sum(lengths[begin:end])
    epochs, separate, sans = plan(tokens, num_samples, seq)
    docs = documents(range(begin, end), epochs, separate, random)
    count = (epochs * tokens - 1) // seq
    rows = samples(lengths, docs, count, seq)
    return docs, rows, shuffle(sans if separate else count, count, random)


def blend(weights: Sequence[float], size: int) -> tuple[list[int], list[int]]:
    """(dataset, its sample) at each place, weights as given."""
    used, which, number = [0] * len(weights), [], []
    for i in range(size):
        errors = [w * max(float(i), 1.0) - float(u) for w, u in zip(weights, used, strict=True)]
        best = max(range(len(weights)), key=lambda k: (errors[k], -k))
        which.append(best)
        number.append(used[best])
        used[best] += 1
    return which, number


def exhaustive_blend(sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    """The same, in which each dataset ends with its size."""
    weights = [size / sum(sizes) for size in sizes]
    used, which, number = [0] * len(sizes), [], []
    for i in range(sum(sizes)):
        left = [k for k in range(len(sizes)) if used[k] < sizes[k]]
        best = max(left, key=lambda k: (weights[k] * max(float(i), 1.0) - float(used[k]), -k))
        which.append(best)
        number.append(used[best])
        used[best] += 1
    return which, number
