"""Megatron-LM's order of samples: its document, sample and shuffle index, in numpy.

There the sequences of a split, repeated for as many epochs as the run takes, are shuffled as a
whole and laid end to end; samples are cut from that stream, and their order is shuffled again:

    documents  [E S]     the sequences in the stream's order
    samples    [N+1, 2]  where each sample starts: (position in `documents`, token in the sequence)
    shuffle    [N]       sample at each place of the run

Sample i covers the tokens from `samples[i]` to `samples[i + 1]`, both included: neighbours share
one token. One legacy RandomState, whose stream numpy has frozen, is used for all three. How the
epochs are shuffled together depends on the number of samples that the run asks for, so another
length of run gives another order from the first sample on.

Source of the semantics: Megatron-LM, `megatron/core/datasets/gpt_dataset.py` and `helpers.cpp`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

SEPARATE_BELOW = 0.80
"""The final epoch is shuffled by itself if less than this share of its samples is asked for."""

_CHUNK_SEQUENCES = 1 << 20
"""So many are looked at together: temporaries stay below 64 MiB."""


@dataclass(frozen=True)
class MegatronIndex:
    """The three arrays.

    Attributes:
        documents: int32 [E S], numbers of sequences.
        samples: int32 (int64 where that is too small) [N + 1, 2].
        shuffle: uint32 (int64 where that is too small) [N].
    """

    documents: np.ndarray
    samples: np.ndarray
    shuffle: np.ndarray


@dataclass(frozen=True)
class EpochPlan:
    """How many epochs a request takes, and how they are shuffled.

    Attributes:
        epochs: whole passes over the sequences.
        samples: that these epochs hold.
        separate_from: first sample of a final epoch that is shuffled by itself; None if all epochs
            are shuffled together.
    """

    epochs: int
    samples: int
    separate_from: int | None


def plan_epochs(epoch_tokens: int, num_samples: int | None, seq_length: int) -> EpochPlan:
    """The smallest number of epochs that holds the samples.

    Args:
        epoch_tokens: of one pass over the sequences; more than `seq_length`.
        num_samples: asked for; None for those of one epoch.
        seq_length: of a sample [tokens].
    """
    assert epoch_tokens > seq_length, "not one sample in an epoch"
    # One more token: the last sample's last label.
    wanted_tokens = num_samples * seq_length + 1 if num_samples else 1
    epochs = -(-wanted_tokens // epoch_tokens)
    separate_from = None
    if epochs > 1 and num_samples is not None:
        before_last = ((epochs - 1) * epoch_tokens - 1) // seq_length
        of_an_epoch = (epoch_tokens - 1) // seq_length
        if num_samples - before_last < int(SEPARATE_BELOW * of_an_epoch):
            separate_from = before_last
    return EpochPlan(epochs, (epochs * epoch_tokens - 1) // seq_length, separate_from)


def build_index(
    lengths: np.ndarray, begin: int, end: int, num_samples: int | None, seq_length: int, seed: int
) -> MegatronIndex:
    """The index of the sequences [begin, end).

    Args:
        lengths: int32, tokens of every sequence of the dataset.
        begin, end: the split.
        num_samples: that the run asks for; None for those of one epoch.
        seq_length: of a sample [tokens].
        seed: of the order.
    """
    # In a file the lengths do not begin at a multiple of their size; gathering would be slow.
    lengths = np.require(lengths, requirements=["ALIGNED"])
    plan = plan_epochs(int(lengths[begin:end].sum(dtype=np.int64)), num_samples, seq_length)
    random = np.random.RandomState(seed)
    documents = _shuffled_documents(begin, end, plan, random)
    samples = build_sample_index(lengths, documents, plan.samples, seq_length)
    return MegatronIndex(documents, samples, _shuffled_samples(plan, random))


def _shuffled_documents(
    begin: int, end: int, plan: EpochPlan, random: np.random.RandomState
) -> np.ndarray:
    documents = np.tile(np.arange(begin, end, dtype=np.int32), plan.epochs)
    together = len(documents) - (end - begin if plan.separate_from is not None else 0)
    random.shuffle(documents[:together])
    if together < len(documents):
        random.shuffle(documents[together:])
    return documents


def _shuffled_samples(plan: EpochPlan, random: np.random.RandomState) -> np.ndarray:
    shuffle = np.arange(plan.samples, dtype=sample_dtype(plan.samples))
    together = plan.samples if plan.separate_from is None else plan.separate_from
    random.shuffle(shuffle[:together])
    if plan.separate_from is not None:
        random.shuffle(shuffle[together:])
    return shuffle


def build_sample_index(
    lengths: np.ndarray, documents: np.ndarray, num_samples: int, seq_length: int
) -> np.ndarray:
    """Where each sample starts in the stream, and where the last one ends, [num_samples + 1, 2].

    Sample i starts at token i x seq_length of the stream: in the first sequence that ends behind
    it. So every row follows from the running sum of lengths by a binary search.

    Args:
        lengths: int32, tokens of every sequence of the dataset.
        documents: int32, the stream's sequences in order; they hold the samples and one token more.
        num_samples: N.
        seq_length: of a sample [tokens].
    """
    dtype = position_dtype(len(documents), int(lengths.max(initial=0)))
    samples = np.zeros((num_samples + 1, 2), dtype)
    row, passed_tokens = 1, 0  # the first sample starts at (0, 0), even if that sequence is empty
    for first in range(0, len(documents), _CHUNK_SEQUENCES):
        sizes = lengths[documents[first : first + _CHUNK_SEQUENCES]]
        ends = np.cumsum(sizes, dtype=np.int64)
        inside = int((passed_tokens + ends[-1] - 1) // seq_length)
        stop = max(row, min(num_samples, inside) + 1)
        tokens = np.arange(row, stop, dtype=np.int64) * seq_length - passed_tokens
        positions = np.searchsorted(ends, tokens, side="right")
        samples[row:stop, 0] = first + positions
        samples[row:stop, 1] = tokens - (ends[positions] - sizes[positions])
        row, passed_tokens = stop, passed_tokens + int(ends[-1])
    assert row == num_samples + 1, f"{passed_tokens} tokens do not hold {num_samples} samples"
    return samples


def position_dtype(num_documents: int, longest: int) -> np.dtype[Any]:
    """Of the sample index."""
    small = max(num_documents, longest) <= np.iinfo(np.int32).max
    return np.dtype(np.int32 if small else np.int64)


def sample_dtype(num_samples: int) -> np.dtype[Any]:
    """Of the shuffle index. The largest uint32 but one is Megatron-LM's limit."""
    small = num_samples < np.iinfo(np.uint32).max - 1
    return np.dtype(np.uint32 if small else np.int64)
