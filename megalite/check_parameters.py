"""Rules about the options that name tensors. One part of `megalite.check`; no torch import."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from math import isfinite

from megalite.config import Config
from megalite.tensor_names import parameter_names, tensor_names
from megalite.treatment import Rule, frozen_names, names_of, patterns, rules

_NEAREST = 3


def rates(config: Config) -> Iterator[str]:
    """Scales and decays are numbers that mean something, of tensors that there are."""
    yield from _valued(config, "--lr-scale", config.parameters.lr_scale, 0.1)
    yield from _valued(config, "--weight-decay-for", config.parameters.weight_decay_for, 0.01)


def freezing(config: Config) -> Iterator[str]:
    """Whole parameters stay, and not all of them."""
    given = config.parameters.freeze
    found, frozen = patterns(given), frozen_names(config)
    if given and not found:
        yield f"--freeze {' '.join(given)}: expected PATTERN,PATTERN..., as in model.embed_tokens.*"
    for rule in found:
        if not any(rule.matches(names) for names in names_of(config).values()):
            yield _no_match(config, "--freeze", rule)
    for packed in parameter_names(config):
        stay = [name for name in packed if name in frozen]
        if stay and len(stay) < len(packed):
            moves = next(name for name in packed if name not in frozen)
            together = "q, k and v" if len(packed) == 3 else "gate and up"
            yield (
                f"--freeze {_words(found)} holds {stay[0]}, but not {moves}: {together} of a layer "
                "lie in one matrix; freeze all of them or none"
            )
            break
    if len(frozen) == len(tensor_names(config)):
        yield f"--freeze {_words(found)} leaves nothing to train; leave out a pattern"


def _valued(config: Config, flag: str, words: Sequence[str], example: float) -> Iterator[str]:
    found = rules(words)
    if words and not found:
        yield f"{flag} {' '.join(words)}: expected PATTERN=X, as in lm_head.*={example:g}"
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
    tensors, frozen = names_of(config), frozen_names(config)
    for index, rule in enumerate(found):
        matched = [names for names in tensors.values() if rule.matches(names)]
        if not matched:
            yield _no_match(config, flag, rule)
        elif all(tensors[name] not in matched for name in tensors if name not in frozen):
            yield f"{flag} {rule.text} has no effect: --freeze holds all that it matches"
        elif all(any(later.matches(names) for later in found[index + 1 :]) for names in matched):
            yield (
                f"{flag} {rule.text} has no effect: later patterns match all that it matches, and "
                "the last match counts; put the general pattern first"
            )


def _no_match(config: Config, flag: str, rule: Rule) -> str:
    known = [name for names in names_of(config).values() for name in names]
    nearest = get_close_matches(rule.pattern, known, n=_NEAREST, cutoff=0.0)
    return f"{flag} {rule.text} matches no tensor; the nearest are {', '.join(nearest)}"


def _words(found: Sequence[Rule]) -> str:
    return ",".join(rule.text for rule in found)
