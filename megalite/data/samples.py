"""Samples of fixed length out of a stream of tokens, and their order as a formula.

Sample j of a split covers the tokens `[j * seq, j * seq + seq]` of the split's stream, seq + 1 of
them: inputs and labels, neighbours share one token. Which sample stands at place i of the run is a
function of (seed, i) alone: epoch `i // N`, and within it `permute(i % N)`. It depends neither on
the layout nor on the length of the run.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np

from megalite.config import Config
from megalite.data.corpus import Corpus
from megalite.data.indexed import IndexedReader
from megalite.data.permutation import permute
from megalite.errors import DataError


class Samples(Protocol):
    """Something with numbered samples of `seq + 1` tokens."""

    num_samples: int

    def read(self, index: int) -> np.ndarray:
        """Tokens of one sample, int64 [seq + 1]."""
        ...


class StreamSamples:
    """Samples of a part of an indexed dataset.

    Args:
        tokens: the whole dataset's tokens.
        start, stop: the part, in tokens.
        seq_length: of a sample [tokens].
        vocab_size: token ids must be below it.
        name: of the dataset, for messages.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        start: int,
        stop: int,
        seq_length: int,
        vocab_size: int,
        name: str,
    ):
        self._tokens, self._start, self._seq, self._name = tokens, start, seq_length, name
        self._vocab_size = vocab_size
        self.num_samples = max(0, (stop - start - 1) // seq_length)

    def read(self, index: int) -> np.ndarray:
        """Tokens of one sample, int64 [seq + 1].

        Raises:
            DataError: a token id that the vocabulary does not have.
        """
        assert 0 <= index < self.num_samples, f"sample {index} of {self.num_samples}"
        begin = self._start + index * self._seq
        sample = self._tokens[begin : begin + self._seq + 1].astype(np.int64)
        if sample.min() < 0 or sample.max() >= self._vocab_size:
            wrong = int(sample.max()) if sample.min() >= 0 else int(sample.min())
            raise DataError(
                f"{self._name}: token id {wrong} near token {begin} is outside "
                f"--vocab-size {self._vocab_size}"
            )
        return sample


class MockSamples:
    """Random tokens: sample i depends on (seed, i) alone."""

    num_samples = 1 << 40

    def __init__(self, seq_length: int, vocab_size: int, seed: int):
        self._seq, self._vocab_size, self._seed = seq_length, vocab_size, seed

    def read(self, index: int) -> np.ndarray:
        """Tokens of one sample, int64 [seq + 1]."""
        generator = np.random.Generator(np.random.Philox(key=[self._seed, index]))
        return generator.integers(0, self._vocab_size, self._seq + 1, dtype=np.int64)


def open_samples(config: Config, corpus: Corpus) -> tuple[Samples, Samples]:
    """Training and validation samples.

    Raises:
        DataError: a split is shorter than one sample, or token ids exceed the vocabulary.
    """
    model = config.model
    if config.data.mock_data:
        seed = config.train.seed
        return (
            MockSamples(model.seq_length, model.vocab_size, seed),
            MockSamples(model.seq_length, model.vocab_size, seed + 1),
        )
    if corpus.max_token >= model.vocab_size:
        raise DataError(
            f"{corpus.description} holds token id {corpus.max_token}, but --vocab-size is "
            f"{model.vocab_size}: give the size of its tokenizer"
        )
    reader = IndexedReader(corpus.prefix)  # type: ignore[arg-type]
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(reader.lengths.astype(np.int64))])
    bounds = split_bounds(config.data.split, len(reader.lengths))
    train, valid = (
        StreamSamples(
            reader.tokens,
            int(ends[begin]),
            int(ends[end]),
            model.seq_length,
            model.vocab_size,
            corpus.description,
        )
        for begin, end in bounds[:2]
    )
    wanted = {"training": train}
    if config.train.eval_steps:
        wanted["validation"] = valid
    for which, (begin, end) in zip(wanted, bounds, strict=False):
        if not wanted[which].num_samples:
            raise DataError(
                f"{corpus.description}: the {which} share of --split {config.data.split} holds "
                f"{int(ends[end] - ends[begin])} tokens, fewer than one sample of --seq-length "
                f"{model.seq_length} + 1: give more text, a shorter --seq-length or another "
                "--split" + (", or --eval-steps 0" if which == "validation" else "")
            )
    return train, valid


def split_bounds(split: str, num_sequences: int) -> list[tuple[int, int]]:
    """Sequence ranges of the shares of `--split`, rounded as Megatron-LM does.

    "969,30,1" over S sequences -> [(0, round(.969 S)), (round(.969 S), round(.999 S)), ...].
    """
    shares = [float(part) for part in split.split(",")]
    total = sum(shares)
    # Each share is normalised before they are summed up, as there: ties then round alike.
    cuts = accumulate((share / total for share in shares), initial=0.0)
    marks = [round(cut * num_sequences) for cut in cuts]
    return list(pairwise(marks))


def sample_order(places: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """Which samples stand at these places of the run.

    Args:
        places: int64, counted from the start of the run over all epochs.
        num_samples: of the split.
        seed: of the order.

    Returns:
        int64 sample numbers, shape of `places`.
    """
    epochs, offsets = np.divmod(places, num_samples)
    samples = np.empty_like(offsets)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        samples[here] = permute(offsets[here], num_samples, seed, int(epoch))
    return samples
