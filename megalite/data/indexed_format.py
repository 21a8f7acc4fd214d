"""Megatron-LM's indexed dataset, `PREFIX.bin` and `PREFIX.idx`: the format.

`.bin` holds the tokens of all sequences, one after the other, with no header. `.idx` holds

    offset  bytes  content
         0      9  b"MMIDIDX\\x00\\x00"
         9      8  version, <Q, 1
        17      1  code of the tokens' dtype, <B
        18      8  number of sequences S, <Q
        26      8  length of the document array D, <Q (number of documents + 1)
        34    4 S  sequence lengths, int32 [tokens]
             8 S  where each sequence starts in .bin, int64 [bytes]
             8 D  document array, int64: 0, then the number of sequences so far after each document

all little-endian. `indexed_reader` reads and checks it, `indexed_writer` writes it. Source of the
format: Megatron-LM, `megatron/core/datasets/indexed_dataset.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER_BYTES = 34
DTYPES: Mapping[int, np.dtype[Any]] = MappingProxyType(
    {
        1: np.dtype("<u1"),
        2: np.dtype("<i1"),
        3: np.dtype("<i2"),
        4: np.dtype("<i4"),
        5: np.dtype("<i8"),
        6: np.dtype("<f8"),
        7: np.dtype("<f4"),
        8: np.dtype("<u2"),
    }
)
TOKEN_CODES = (1, 2, 3, 4, 5, 8)
"""dtype codes that can hold token ids; 6 and 7 are floats."""

BLOCK = 1 << 20
"""Elements of an index, or tokens, that reader and writer handle together: neither holds anything
that grows with the dataset."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype Megatron-LM writes for a tokenizer of this size (before padding)."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")
