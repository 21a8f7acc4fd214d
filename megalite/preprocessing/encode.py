"""A chunk of records into token ids, as a worker process does it. Equal wherever it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from megalite.data.indexed_format import token_dtype
from megalite.reading.chunks import Bad, Chunk
from megalite.reading.records import SHOWN_BAD, encoded
from megalite.tokenizer.base import Tokenizer
from megalite.tokenizer.choose import open_tokenizer
from megalite.tokenizer.settings import TokenizerSettings


@dataclass(frozen=True)
class Encoding:
    """What is done with every record.

    Attributes:
        tokenizer, vocab_size: which one; see `open_tokenizer`.
        keys: the field of each dataset.
        append_eod: end documents that are not empty with the end-of-document token.
        limit: longest record [bytes].
    """

    tokenizer: TokenizerSettings
    vocab_size: int
    keys: tuple[str, ...]
    append_eod: bool
    limit: int


@dataclass(frozen=True)
class Encoded:
    """Documents of one key.

    Attributes:
        tokens: of all of them, shape [sum(lengths)], in the dataset's dtype.
        lengths: of each that is not empty, int32; it is one sequence.
        sequences: 0 or 1 for each document, uint8.
        text_bytes: of their texts, as UTF-8.
        max_token: the largest id, -1 if there is none.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    sequences: np.ndarray
    text_bytes: int
    max_token: int


@dataclass(frozen=True)
class Result:
    """A chunk's documents by key, and what was left out: the first of them, and their number."""

    datasets: tuple[Encoded, ...]
    bad: tuple[Bad, ...]
    bad_count: int


def encode_chunk(encoding: Encoding, chunk: Chunk) -> Result:
    """Encode every good record of a chunk."""
    tokenizer = _opened(encoding.tokenizer, encoding.vocab_size)
    good, rows, bad = encoded(chunk, encoding.keys, encoding.limit, tokenizer)
    columns = zip(*good, strict=True) if good else [()] * len(encoding.keys)
    return Result(
        datasets=tuple(
            _dataset(tokenizer, *each, encoding.append_eod)
            for each in zip(columns, rows, strict=True)
        ),
        bad=tuple(bad[:SHOWN_BAD]),
        bad_count=sum(each.count for each in bad),
    )


def _dataset(
    tokenizer: Tokenizer, column: Sequence[str], rows: Sequence[np.ndarray], append_eod: bool
) -> Encoded:
    """The documents of one key: their texts and the tokens of these."""
    counts = np.array([len(row) for row in rows], np.int64)
    sequences = counts > 0
    lengths = counts[sequences] + append_eod
    tokens = np.empty(lengths.sum(), token_dtype(tokenizer.vocab_size))
    is_text = np.ones(len(tokens), bool)
    if append_eod:
        last = np.cumsum(lengths) - 1
        is_text[last] = False
        tokens[last] = tokenizer.eod
    if len(tokens):
        text_tokens = np.concatenate(rows)
        assert text_tokens.min() >= 0 and text_tokens.max() < tokenizer.vocab_size
        tokens[is_text] = text_tokens
    return Encoded(
        tokens=tokens,
        lengths=lengths.astype(np.int32),
        sequences=sequences.astype(np.uint8),
        text_bytes=sum(len(text.encode()) for text in column),
        max_token=int(tokens.max(initial=0)) if len(tokens) else -1,
    )


@cache
def _opened(settings: TokenizerSettings, vocab_size: int) -> Tokenizer:
    """The tokenizer of this process."""
    return open_tokenizer(settings, vocab_size)
