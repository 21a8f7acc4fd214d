"""Small indexed datasets for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megalite.config import Config, resolve
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.mixture import prepare_mixture
from megalite.data.samples import Samples
from megalite.data.splits import SplitSamples, open_samples
from megalite.tokenizer.choose import open_tokenizer


def write_dataset(
    prefix: Path, seed: int, documents: int = 100, longest: int = 30, *, gaps: bool = False
) -> Path:
    """Documents of random tokens below 1000, of one sequence each; returns the prefix.

    Args:
        prefix: of the two files.
        seed: of tokens and lengths.
        documents: their number.
        longest: tokens of the longest.
        gaps: some documents are empty, and some have two sequences.
    """
    draw = np.random.default_rng(seed)
    writer = IndexedWriter(prefix, np.dtype("<u2"))
    for _ in range(documents):
        for _ in range(int(draw.integers(0, 3)) if gaps else 1):
            writer.add_sequence(draw.integers(0, 1000, draw.integers(1, longest + 1)))
        writer.end_document()
    writer.close()
    return prefix


def data_config(folder: Path, *words: str | Path, **values: object) -> Config:
    """A configuration that reads these words of `--data`, with a cache of its own."""
    small = dict(
        data=tuple(map(str, words)),
        data_cache_path=str(folder / "cache"),
        vocab_size=1000,
        seq_length=16,
        micro_batch_size=2,
        global_batch_size=8,
        steps=10,
        split="80,20",
    )
    return resolve(Config().replace(**{**small, **values}))


def open_data(config: Config) -> tuple[Samples, Samples]:
    """Training and validation samples."""
    return open_splits(config)[:2]


def open_splits(config: Config) -> SplitSamples:
    """The samples of all splits."""
    tokenizer = open_tokenizer(config.data, config.model.vocab_size)
    return open_samples(config, prepare_mixture(config.data, tokenizer))


def rows(samples: Samples, count: int) -> list[list[int]]:
    """Tokens of the first samples of a run, in their order."""
    return [samples.read(int(i)).tolist() for i in samples.order(np.arange(count))]
