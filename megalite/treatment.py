"""How each tensor of the model is trained: the options that name tensors. No torch import.

A rule is `PATTERN=X`, or a pattern alone. Patterns match whole names of tensors as the shell
matches names of files. Of several rules that match a tensor the last one counts, so that a general
rule stands first and its exceptions behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from megalite.config import Config
from megalite.tensor_names import EMBEDDING, HEAD, is_norm, tensor_names


@dataclass(frozen=True)
class Rule:
    """A pattern, and what holds for the tensors that it matches.

    Attributes:
        text: as it was given.
        pattern: of names.
        value: None if the text has none, or one that is no number.
    """

    text: str
    pattern: str
    value: float | None

    def matches(self, names: Sequence[str]) -> bool:
        """Whether one of the names of a tensor matches."""
        return any(fnmatchcase(name, self.pattern) for name in names)


@dataclass(frozen=True)
class Treatment:
    """Of one tensor.

    Attributes:
        lr_scale: times the learning rate.
        weight_decay: decoupled.
        frozen: it stays as it is, whatever its rate and decay.
    """

    lr_scale: float
    weight_decay: float
    frozen: bool


def rules(words: Sequence[str]) -> tuple[Rule, ...]:
    """The rules of a field whose patterns have values, in order."""
    found = []
    for text in _parts(words):
        pattern, _, value = text.rpartition("=")
        found.append(Rule(text, pattern, _number(value)))
    return tuple(found)


def patterns(words: Sequence[str]) -> tuple[Rule, ...]:
    """The rules of a field of patterns alone."""
    return tuple(Rule(text, text, None) for text in _parts(words))


def names_of(config: Config) -> dict[str, tuple[str, ...]]:
    """All names that patterns may call a tensor by: a tied embedding is the head too."""
    names: dict[str, tuple[str, ...]] = {name: (name,) for name in tensor_names(config)}
    if config.model.tie_embeddings:
        names[EMBEDDING] = (EMBEDDING, HEAD)
    return names


def treatments(config: Config) -> Mapping[str, Treatment]:
    """The treatment of every whole tensor, by its name, for rules that `megalite.check` allows."""
    scales, decays = rules(config.parameters.lr_scale), rules(config.parameters.weight_decay_for)
    frozen = patterns(config.parameters.freeze)
    return {
        name: Treatment(
            lr_scale=_last(scales, names, 1.0),
            weight_decay=_last(decays, names, 0.0 if is_norm(name) else config.train.weight_decay),
            frozen=any(rule.matches(names) for rule in frozen),
        )
        for name, names in names_of(config).items()
    }


def frozen_names(config: Config) -> frozenset[str]:
    """The whole tensors that stay as they are."""
    return frozenset(name for name, treatment in treatments(config).items() if treatment.frozen)


def without_rules(config: Config) -> Config:
    """The run if no option named a tensor."""
    return config.replace(lr_scale=(), weight_decay_for=(), freeze=())


def _last(found: Sequence[Rule], names: Sequence[str], default: float) -> float:
    """The value of the last rule that matches."""
    values = [rule.value for rule in found if rule.matches(names)]
    return next((value for value in reversed(values) if value is not None), default)


def _parts(words: Sequence[str]) -> list[str]:
    return [part.strip() for word in words for part in word.split(",") if part.strip()]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
