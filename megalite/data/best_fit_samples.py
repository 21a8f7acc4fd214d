"""Samples of whole documents, packed by best fit; see `best_fit`. No torch import."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megalite.data.best_fit import pack, remainders
from megalite.data.index_cache import Arrays, IndexCache
from megalite.data.samples import PADDING, sample_order
from megalite.data.token_store import Piece, Span, TokenStore

BLOCK_DOCUMENTS = 1 << 22
"""Documents that are looked at together while they are packed: a quarter of a gigabyte."""


class BestFitSamples:
    """Samples of the documents of some sequences. Their order is the formula `sample_order`.

    The documents of a sample stand in the order of the dataset, so that one that the split cuts,
    and that therefore has no end, stands before padding and nothing else.

    Args:
        store: the dataset.
        fingerprint: of its content, for the cache.
        begin, end: the sequences of the split.
        seq_length: of a sample [tokens].
        seed: of the order.
        cache: where the index is kept.
    """

    def __init__(
        self,
        store: TokenStore,
        fingerprint: str,
        begin: int,
        end: int,
        seq_length: int,
        seed: int,
        cache: IndexCache,
    ):
        self._store, self._sequences = store, (begin, end)
        self._seq, self._seed = seq_length, seed
        first, behind = store.document_range(begin, end)
        self._first, self._count = first, max(0, behind - first)

        def build(_: Arrays) -> Arrays:
            packing = pack(self._lengths, seq_length)
            return {
                "documents": packing.documents,
                "firsts": packing.firsts,
                "whole": packing.whole,
                "totals": np.array([packing.num_cut, packing.num_tokens]),
            }

        facts = {"content": fingerprint, "sequences": [begin, end], "seq_length": seq_length}
        arrays = cache.get("best-fit", facts, build)
        self._documents, self._firsts = arrays["documents"], arrays["firsts"]
        self._whole = arrays["whole"]
        self._num_cut, self._num_tokens = arrays["totals"].tolist()
        self._num_packed = len(self._firsts) - 1
        self.num_samples = self._num_packed + len(self._whole)

    def describe(self) -> str:
        """How full the samples are, and how many documents are cut."""
        if not self.num_samples:
            return ""
        padding = 1.0 - self._num_tokens / self.num_samples / (self._seq + 1)
        return (
            f"{self._store.name}: packed by best fit into {self.num_samples:,} samples, "
            f"{100 * padding:.2g}% of their places empty; {self._num_cut:,} of {self._count:,} "
            f"documents ({100 * self._num_cut / self._count:.2g}%) are longer than a sample and cut"
        )

    def order(self, places: np.ndarray) -> np.ndarray:
        """Samples at these places of the run, int64, shape of `places`."""
        return sample_order(places, self.num_samples, self._seed)

    def read(self, index: int) -> np.ndarray:
        """Tokens of one sample and PADDING, int64 [seq + 1].

        Raises:
            DataError: a token id that the vocabulary does not have.
        """
        tokens = self._store.gather(self._spans(index))
        sample = np.full(self._seq + 1, PADDING, np.int64)
        sample[: len(tokens)] = tokens
        return sample

    def pieces(self, index: int) -> list[Piece]:
        """The documents that a sample consists of, in order."""
        return self._store.pieces(self._spans(index))

    def _spans(self, index: int) -> list[Span]:
        index %= self.num_samples
        if index >= self._num_packed:
            first = np.array([self._first])
            start = int(self._store.document_bounds(first, *self._sequences)[0])
            start += int(self._whole[index - self._num_packed])
            return [(start, start + self._seq + 1)]
        inside = slice(*self._firsts[index : index + 2].tolist())
        documents = self._first + np.sort(self._documents[inside]).astype(np.int64)
        starts = self._store.document_bounds(documents, *self._sequences)
        stops = self._store.document_bounds(documents + 1, *self._sequences)
        _, rest = remainders(stops - starts, self._seq)
        return list(zip((stops - rest).tolist(), stops.tolist(), strict=True))

    def _lengths(self) -> Iterator[np.ndarray]:
        for start in range(0, self._count, BLOCK_DOCUMENTS):
            stop = min(start + BLOCK_DOCUMENTS, self._count)
            numbers = self._first + np.arange(start, stop + 1)
            yield np.diff(self._store.document_bounds(numbers, *self._sequences))
