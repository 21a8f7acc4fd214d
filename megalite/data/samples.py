"""Samples of fixed length out of a stream of tokens, and their order as a formula.

Sample j of a split covers the tokens `[j * seq, j * seq + seq]` of the split's stream, seq + 1 of
them: inputs and labels, neighbours share one token. Which sample stands at place i of the run is a
function of (seed, i) alone: epoch `i // N`, and within it `permute(i % N)`. It depends neither on
the layout nor on the length of the run. The number of a sample counts over all epochs: sample j of
epoch e is `e N + j`, so that what is drawn for a sample can be drawn anew in each epoch.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from megalite.data.permutation import permute
from megalite.data.token_store import Piece, TokenStore

PADDING = -1
"""In place of a token where a sample is not full: no input that matters, and no label."""


class Samples(Protocol):
    """Numbered samples of `seq + 1` tokens, and the order in which a run takes them."""

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        ...

    def order(self, places: np.ndarray) -> np.ndarray:
        """Numbers of the samples at these places of the run, counted over all epochs.

        Args:
            places: int64, any shape.

        Returns:
            int64, shape of `places`.
        """
        ...

    def read(self, index: int) -> np.ndarray:
        """Tokens of one sample, int64 [seq + 1]; PADDING stands at the end alone.

        Args:
            index: of `order`, or below `num_samples` for those of the first epoch.
        """
        ...


class DocumentSamples(Samples, Protocol):
    """Samples that know what they are made of."""

    def describe(self) -> str:
        """For the opening of a run: what is not to be seen from the data; mostly nothing."""
        ...

    def pieces(self, index: int) -> list[Piece]:
        """The documents that a sample consists of, in order."""
        ...


class StreamSamples:
    """Samples of a part of an indexed dataset.

    Args:
        store: the dataset.
        start, stop: the part, in tokens.
        seq_length: of a sample [tokens].
        seed: of the order.
    """

    def __init__(self, store: TokenStore, start: int, stop: int, seq_length: int, seed: int):
        self._store, self._start, self._seq, self._seed = store, start, seq_length, seed
        self.num_samples = max(0, (stop - start - 1) // seq_length)

    def describe(self) -> str:
        """Nothing."""
        return ""

    def order(self, places: np.ndarray) -> np.ndarray:
        """Samples at these places of the run, int64, shape of `places`."""
        return sample_order(places, self.num_samples, self._seed)

    def read(self, index: int) -> np.ndarray:
        """Tokens of one sample, int64 [seq + 1].

        Raises:
            DataError: a token id that the vocabulary does not have.
        """
        return self._store.gather([self._span(index)])

    def pieces(self, index: int) -> list[Piece]:
        """The documents that a sample consists of, in order."""
        return self._store.pieces([self._span(index)])

    def _span(self, index: int) -> tuple[int, int]:
        begin = self._start + index % self.num_samples * self._seq
        return begin, begin + self._seq + 1


class MockSamples:
    """Random tokens: sample i depends on (seed, i) alone."""

    num_samples = 1 << 40

    def __init__(self, seq_length: int, vocab_size: int, seed: int):
        self._seq, self._vocab_size, self._seed = seq_length, vocab_size, seed

    def describe(self) -> str:
        """Nothing."""
        return ""

    def order(self, places: np.ndarray) -> np.ndarray:
        """Samples at these places of the run, int64, shape of `places`."""
        return sample_order(places, self.num_samples, self._seed)

    def read(self, index: int) -> np.ndarray:
        """Tokens of one sample, int64 [seq + 1]."""
        generator = np.random.Generator(np.random.Philox(key=[self._seed, index]))
        return generator.integers(0, self._vocab_size, self._seq + 1, dtype=np.int64)

    def pieces(self, index: int) -> list[Piece]:  # noqa: ARG002
        """None: random tokens are of no document."""
        return []


def sample_order(places: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """Which samples stand at these places of the run.

    Args:
        places: int64, counted from the start of the run over all epochs.
        num_samples: of the split.
        seed: of the order.

    Returns:
        int64 sample numbers, counted over all epochs, shape of `places`.
    """
    epochs, offsets = np.divmod(places, num_samples)
    samples = np.empty_like(offsets)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        within = permute(offsets[here], num_samples, seed, int(epoch))
        samples[here] = epoch * num_samples + within
    return samples
