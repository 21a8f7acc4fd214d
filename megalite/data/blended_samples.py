"""Samples of several datasets, blended. No torch import.

The interleave says from which dataset the sample at each place comes, and how many of that dataset
came before it; which one it is, is the order of that dataset itself. Datasets without weights are
each used once an epoch, in the same interleave every time. With weights there are no epochs of the
whole: each dataset begins anew when it is used up.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from megalite.data.blend import MOST_DATASETS, WORTH_COMPILING, Greedy, compiler
from megalite.data.index_cache import Arrays, IndexCache
from megalite.data.token_store import Piece
from megalite.errors import DataError

if TYPE_CHECKING:
    from megalite.data.samples import DocumentSamples


class BlendedSamples:
    """Samples of all parts, numbered one part after the other, and epoch after epoch.

    Sample j of a part in its epoch e is `e * (samples of all parts) + (those of the parts before
    it) + j`: a part that is smaller is in a later epoch.

    Args:
        parts: the datasets' samples.
        weights: of each; None: each is used once an epoch.
        count: places that are needed.
        cache: where the interleave is kept.
    """

    def __init__(
        self,
        parts: Sequence[DocumentSamples],
        weights: Sequence[float] | None,
        count: int,
        cache: IndexCache,
    ):
        if len(parts) > MOST_DATASETS:
            raise DataError(
                f"{len(parts)} datasets in a blend: at most {MOST_DATASETS} are possible"
            )
        self._parts = list(parts)
        sizes = [part.num_samples for part in parts]
        self._firsts = list(accumulate(sizes, initial=0))
        self._epoch_samples = self._firsts[-1] if weights is None else None
        self._datasets, self._samples = interleave(
            sizes if weights is None else weights,
            sizes if weights is None else None,
            count if weights is not None else min(count, sum(sizes)),
            cache,
        )

    @property
    def num_samples(self) -> int:
        """Samples of an epoch; with weights, those until the first part begins anew."""
        if self._epoch_samples is not None:
            return self._epoch_samples
        sizes = np.diff(self._firsts)
        again = np.flatnonzero(self._samples >= sizes[self._datasets])
        return int(again[0]) if len(again) else len(self._samples)

    def describe(self) -> str:
        """What the parts have to say, a line each."""
        return "\n".join(filter(None, (part.describe() for part in self._parts)))

    def order(self, places: np.ndarray) -> np.ndarray:
        """Samples at these places of the run, int64, shape of `places`."""
        epochs, within = np.divmod(places, self._epoch_samples or len(self._samples))
        assert within.max(initial=0) < len(self._samples), "a place after the end of the run"
        assert self._epoch_samples or not epochs.any(), "a place after the end of the run"
        datasets, samples = self._datasets[within], self._samples[within]
        numbers = np.empty(np.shape(places), np.int64)
        for dataset in np.unique(datasets):
            here, part = datasets == dataset, self._parts[dataset]
            nth = samples[here] + epochs[here] * part.num_samples
            rounds, within_part = np.divmod(part.order(nth), part.num_samples)
            numbers[here] = rounds * self._firsts[-1] + self._firsts[dataset] + within_part
        return numbers

    def read(self, index: int) -> np.ndarray:
        """Tokens of one sample, int64 [seq + 1]."""
        part, within = self._part_of(index)
        return part.read(within)

    def pieces(self, index: int) -> list[Piece]:
        """The documents that a sample consists of, in order."""
        part, within = self._part_of(index)
        return part.pieces(within)

    def _part_of(self, index: int) -> tuple[DocumentSamples, int]:
        rounds, within = divmod(index, self._firsts[-1])
        dataset = bisect_right(self._firsts, within) - 1
        part = self._parts[dataset]
        return part, rounds * part.num_samples + within - self._firsts[dataset]


def interleave(
    weights: Sequence[float], sizes: Sequence[int] | None, count: int, cache: IndexCache
) -> tuple[np.ndarray, np.ndarray]:
    """The greedy interleave from the cache, continued there if it is too short.

    Args:
        weights, sizes: as of `Greedy`.
        count: places that are needed.
        cache: where it is kept.

    Returns:
        int16 and int64, at least `count` long; see `Greedy.extend`.
    """

    def build(found: Arrays) -> Arrays:
        datasets = found.get("dataset_index", np.empty(0, np.int16))
        samples = found.get("dataset_sample_index", np.empty(0, np.int64))
        missing = count - len(datasets)
        compiled = compiler() if missing > WORTH_COMPILING else None
        used = np.bincount(datasets, minlength=len(weights)).tolist()
        more = Greedy(weights, sizes, used, compiled).extend(missing)
        return {
            "dataset_index": np.concatenate([datasets, more[0]]),
            "dataset_sample_index": np.concatenate([samples, more[1]]),
        }

    facts = {"weights": [float(weight).hex() for weight in weights], "sizes": sizes}
    arrays = cache.get("blend", facts, build, rows=count)
    return arrays["dataset_index"], arrays["dataset_sample_index"]
