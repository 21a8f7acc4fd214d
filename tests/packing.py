"""Datasets and configurations for tests of best-fit packing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from datasets import data_config

from megalite.config import Config
from megalite.data.indexed_writer import IndexedWriter

EOD = 256


def write(prefix: Path, lengths: list[int], seed: int = 0, *, gaps: bool = False) -> Path:
    """Documents of random bytes that end as the byte tokenizer ends them.

    With gaps some documents are empty and some have two sequences.
    """
    draw = np.random.default_rng(seed)
    writer = IndexedWriter(prefix, np.dtype("<u2"))
    for number, length in enumerate(lengths):
        tokens = np.append(draw.integers(0, 256, length - 1), EOD)
        cut = length // 2 if gaps and number % 3 == 0 else 0
        for part in (tokens[:cut], tokens[cut:]):
            if len(part):
                writer.add_sequence(part)
        writer.end_document()
        if gaps and number % 5 == 0:
            writer.end_document()
    writer.close()
    return prefix


def random_lengths(seed: int, count: int = 150) -> list[int]:
    return np.random.default_rng(seed).integers(2, 60, count).tolist()


def packed(folder: Path, *words: str | Path, **values: object) -> Config:
    return data_config(folder, *words, packing="best-fit", tokenizer_type="ByteTokenizer", **values)
