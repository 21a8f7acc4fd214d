"""Rules about the options that name tensors. One part of `megalite.check`; no torch import."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from math import isfinite

from megalite.config import Config
from megalite.treatment import Rule, names_of, rules

_NEAREST = 3


def rates(config: Config) -> Iterator[str]:
    """Scales and decays are numbers that mean something, of tensors that there are."""
    yield from _valued(config, "--lr-scale", config.parameters.lr_scale, 0.1)
    yield from _valued(config, "--weight-decay-for", config.parameters.weight_decay_for, 0.01)


def _valued(config: Config, flag: str, words: Sequence[str], example: float) -> Iterator[str]:
    found = rules(words)
    for rule in found:
        if not rule.pattern or rule.value is None:
            yield f"{flag} {rule.text}: expected PATTERN=X, as in lm_head.*={example:g}"
        elif not isfinite(rule.value) or rule.value < 0:
            yield f"{flag} {rule.text}: X must be a number from 0 on"
        elif flag == "--lr-scale" and not rule.value:
            yield f"{flag} {rule.text}: X must be above 0"
    yield from _useless(config, flag, [rule for rule in found if rule.pattern])


def _useless(config: Config, flag: str, found: Sequence[Rule]) -> Iterator[str]:
    """Rules that match no tensor, or none that a later rule leaves to them."""
    tensors = names_of(config)
    for index, rule in enumerate(found):
        matched = [names for names in tensors.values() if rule.matches(names)]
        if not matched:
            known = [name for names in tensors.values() for name in names]
            nearest = get_close_matches(rule.pattern, known, n=_NEAREST, cutoff=0.0)
            yield f"{flag} {rule.text} matches no tensor; the nearest are {', '.join(nearest)}"
        elif all(any(later.matches(names) for later in found[index + 1 :]) for names in matched):
            yield (
                f"{flag} {rule.text} has no effect: later patterns match all that it matches, and "
                "the last match counts; put the general pattern first"
            )
