"""How predictable a stream of tokens is by counting alone: what a model should beat."""

from __future__ import annotations

import numpy as np

MOST_PAIRED_TOKENS = 2048
"""Pairs of neighbours are counted up to this vocabulary, in a table of 32 MB at most. A larger
one has more pairs than a corpus shows often enough for their counts to mean anything."""

_CHUNK_TOKENS = 1 << 20


class TokenCounter:
    """Counts tokens, and pairs of neighbours if the vocabulary is small, a chunk at a time.

    Args:
        vocab_size: tokens are below it.

    Attributes:
        total: tokens so far.
        largest: token id so far.
    """

    def __init__(self, vocab_size: int):
        self.total = 0
        self.largest = 0
        self._size = vocab_size
        self._counts = np.zeros(vocab_size, np.int64)
        paired = vocab_size if vocab_size <= MOST_PAIRED_TOKENS else 0
        self._pairs = np.zeros(paired * paired, np.int64)
        self._buffer: list[np.ndarray] = []
        self._buffered = 0

    def add(self, tokens: np.ndarray) -> None:
        """Count the next tokens of the stream."""
        self.total += len(tokens)
        self._buffer.append(tokens)
        self._buffered += len(tokens)
        if self._buffered >= _CHUNK_TOKENS:
            self._count()

    def entropies(self) -> tuple[float, float]:
        """(unigram, bigram) entropy of the stream in nats: H(x) and H(x | the token before).

        The latter is 0 if pairs are not counted.
        """
        self._count()
        unigram = _entropy(self._counts)
        if not len(self._pairs):
            return unigram, 0.0
        before = self._pairs.reshape(self._size, self._size).sum(axis=1)
        return unigram, _entropy(self._pairs) - _entropy(before)

    def _count(self) -> None:
        if not self._buffered:
            return
        stream = np.concatenate(self._buffer).astype(np.int64)
        self.largest = max(self.largest, int(stream.max()))
        self._counts += np.bincount(stream[1:], minlength=self._size)
        if len(self._pairs):
            codes = stream[:-1] * self._size + stream[1:]
            self._pairs += np.bincount(codes, minlength=len(self._pairs))
        self._buffer = [stream[-1:]]  # the next pair begins here
        self._buffered = 0


def _entropy(counts: np.ndarray) -> float:
    total = counts.sum()
    if not total:
        return 0.0
    shares = counts[counts > 0] / total
    return float(-(shares * np.log(shares)).sum())
