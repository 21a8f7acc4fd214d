"""Which documents a step of a run was trained on, from the run's configuration alone.

The order of samples is a formula, so nothing is recorded while a run goes; that the data is still
what it was, the run's `data.json` says (`record`). No torch import.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalite.config import Config
from megalite.config_data import DataConfig
from megalite.data.mixture import prepare_mixture
from megalite.data.record import DataRecord, record_of
from megalite.data.samples import PADDING
from megalite.data.source import (
    source_problems,
    test_ingredients,
    token_texts_known,
    train_ingredients,
    valid_ingredients,
)
from megalite.data.splits import open_samples
from megalite.data.token_store import Piece
from megalite.errors import ConfigError, DataError
from megalite.tokenizer.choose import open_tokenizer


@dataclass(frozen=True)
class Entry:
    """One sample of a global batch.

    Attributes:
        place: in the global batch, from 0.
        sample: its number, counted over all epochs.
        pieces: the documents in it, in order; none of random tokens.
        texts: of each piece as it is in the data, before fill-in-the-middle; None where the
            tokenizer is not known.
    """

    place: int
    sample: int
    pieces: tuple[Piece, ...]
    texts: tuple[str | None, ...]


def ledger(config: Config, step: int, record: DataRecord | None) -> list[Entry]:
    """The samples of a step's global batch.

    Args:
        config: as it was saved, with every derived value.
        step: as it is logged: the first is 1.
        record: of the data that the run was trained on; None if it is not known.

    Raises:
        ConfigError: there is no such step, or the data cannot be read, or is not what it was.
    """
    train = config.train
    problems = source_problems(config.data)
    if problems and _has_relative_paths(config.data):
        problems.append("relative paths are looked up here: go where the run was started")
    if not 1 <= step <= train.steps:
        problems.append(f"--step {step}: the run has the steps 1 to {train.steps}")
    if problems:
        raise ConfigError(problems)
    tokenizer = open_tokenizer(config.data, config.model.vocab_size)
    mixture = prepare_mixture(config.data, tokenizer)
    if record is not None:
        changes = record.changes(record_of(mixture, tokenizer.fingerprint))
        if changes:
            raise DataError(changes)
    samples = open_samples(config.replace(fim_rate=0.0), mixture).train
    known = token_texts_known(config.data)
    sizes = config.batch_sizes
    places = sizes.consumed(step - 1) + np.arange(sizes.size(step - 1))
    entries = []
    for place, sample in enumerate(samples.order(places)):
        pieces = tuple(samples.pieces(int(sample)))
        texts: list[str | None] = [None] * len(pieces)
        if known:
            tokens = samples.read(int(sample))
            tokens = tokens[tokens != PADDING]
            cuts = np.cumsum([piece.stop - piece.start for piece in pieces])[:-1]
            texts = [tokenizer.decode(part.tolist()) for part in np.split(tokens, cuts)]
        entries.append(Entry(place, int(sample), pieces, tuple(texts)))
    return entries


def _has_relative_paths(data: DataConfig) -> bool:
    read = (*train_ingredients(data), *valid_ingredients(data), *test_ingredients(data))
    return any(not Path(path).is_absolute() for each in read for path in each.data.data)
