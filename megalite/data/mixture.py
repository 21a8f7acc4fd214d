"""What a run reads: one corpus, or several that are blended. No torch import."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megalite.config_data import DataConfig
from megalite.data.corpus import Corpus, prepare_corpus
from megalite.data.source import (
    Ingredient,
    test_ingredients,
    train_ingredients,
    valid_ingredients,
)
from megalite.errors import DataError
from megalite.tokenizer.base import Tokenizer

Evaluated = Literal["valid", "test"]
"""The splits that are evaluated: validations on the way, and a test at the end."""


@dataclass(frozen=True)
class Part:
    """One corpus of a blend.

    Attributes:
        corpus: the tokenized corpus.
        weight: only ratios of weights count; None: as much as its size, each sample once an epoch.
    """

    corpus: Corpus
    weight: float | None = None


@dataclass(frozen=True)
class Mixture:
    """What a run trains, validates and is tested on.

    Attributes:
        train: at least one part.
        valid, test: empty if that data is a share of each part of `train`, or there is none.
    """

    train: tuple[Part, ...]
    valid: tuple[Part, ...] = ()
    test: tuple[Part, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Of the tokens and weights; ranks that differ in it refuse to train together."""
        if self._only is not None:
            return self._only.fingerprint
        told = [
            [(part.corpus.fingerprint, part.weight) for part in parts]
            for parts in (self.train, self.valid, self.test)
        ]
        return hashlib.sha256(repr(told).encode()).hexdigest()[:16]

    @property
    def is_text(self) -> bool:
        """Whether all of it was tokenized here, so that tokens have a text that is known."""
        parts = (*self.train, *self.valid, *self.test)
        return all(part.corpus.text_bytes for part in parts)

    @property
    def unigram_nats(self) -> float:
        """Entropy of a token [nats]; 0 if unknown: that of a blend is."""
        return self._only.unigram_nats if self._only is not None else 0.0

    @property
    def bigram_nats(self) -> float:
        """Entropy of a token given the one before [nats]; 0 if unknown."""
        return self._only.bigram_nats if self._only is not None else 0.0

    def bits_per_byte(self, loss: float, which: Evaluated = "valid") -> float | None:
        """A loss [nats per token] of a split as bits per byte of text; None if that is unknown.

        Of a blend, a token has the mean length of its parts' tokens, weighted as they are blended.
        """
        if not self.is_text:
            return None
        if self._only is not None:
            return self._only.bits_per_byte(loss)
        parts = (self.test if which == "test" else self.valid) or self.train
        bytes_per_token = sum(
            share * part.corpus.text_bytes / part.corpus.tokens
            for share, part in zip(shares(parts), parts, strict=True)
        )
        return loss / math.log(2.0) / bytes_per_token

    def describe(self) -> str:
        """For the opening of a run: a line for each part."""
        if self._only is not None:
            return self._only.describe()
        lines = [
            f"{100 * share:.3g}% {part.corpus.describe()}"
            for share, part in zip(shares(self.train), self.train, strict=True)
        ]
        for name, parts in (("validation", self.valid), ("test", self.test)):
            lines += [
                f"{name}, {100 * share:.3g}% {part.corpus.describe()}"
                for share, part in zip(shares(parts), parts, strict=True)
            ]
        return "\n".join(lines)

    @property
    def _only(self) -> Corpus | None:
        apart = self.valid or self.test
        return self.train[0].corpus if len(self.train) == 1 and not apart else None


def shares(parts: Sequence[Part]) -> list[float]:
    """How much of a blend each part is, about: without weights, by tokens."""
    sizes = [p.weight if p.weight is not None else float(p.corpus.tokens) for p in parts]
    return [size / sum(sizes) for size in sizes]


def prepare_mixture(data: DataConfig, tokenizer: Tokenizer | None = None) -> Mixture:
    """Find or tokenize all that the configuration names; see `prepare_corpus`.

    Raises:
        DataError: what is wrong with each corpus that cannot be used.
    """
    problems: list[str] = []
    train = _prepare(train_ingredients(data), tokenizer, problems)
    valid = _prepare(valid_ingredients(data), tokenizer, problems)
    test = _prepare(test_ingredients(data), tokenizer, problems)
    problems += _other_tokenizers((*train, *valid, *test))
    if problems:
        raise DataError(problems)
    return Mixture(train, valid, test)


def _other_tokenizers(parts: Sequence[Part]) -> list[str]:
    """A sentence for each corpus that another tokenizer wrote than the first that is known."""
    known = [part.corpus for part in parts if part.corpus.tokenizer_fingerprint]
    return [
        f"{corpus.description} was tokenized with {corpus.tokenizer_type} "
        f"({corpus.tokenizer_fingerprint}), but {known[0].description} with "
        f"{known[0].tokenizer_type} ({known[0].tokenizer_fingerprint}): preprocess them with one "
        "tokenizer"
        for corpus in known[1:]
        if corpus.tokenizer_fingerprint != known[0].tokenizer_fingerprint
    ]


def _prepare(
    ingredients: Sequence[Ingredient], tokenizer: Tokenizer | None, problems: list[str]
) -> tuple[Part, ...]:
    parts = []
    for ingredient in ingredients:
        try:
            parts.append(Part(prepare_corpus(ingredient.data, tokenizer), ingredient.weight))
        except DataError as error:
            problems += error.violations
    return tuple(parts)
