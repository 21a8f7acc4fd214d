"""What the options that name tensors mean, written for reading: the definition's part of it."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from megalite.config import Config


class DefinedRules:
    """Rates, decays and what stays, by the names of whole tensors.

    Args:
        config: resolved.
        names: of all tensors.

    Attributes:
        lr_scales, decays: by name.
        frozen: the names of weights that stay.
    """

    def __init__(self, config: Config, names: Iterable[str]):
        given, decay = config.parameters, config.train.weight_decay
        self.lr_scales: dict[str, float] = {}
        self.decays: dict[str, float] = {}
        frozen = set()
        for name in names:
            called = [name]
            if config.model.tie_embeddings and name == "model.embed_tokens.weight":
                called.append("lm_head.weight")
            plain = 0.0 if name.endswith("norm.weight") else decay
            self.lr_scales[name] = _last_match(given.lr_scale, called, 1.0)
            self.decays[name] = _last_match(given.weight_decay_for, called, plain)
            if any(
                fnmatch.filter(called, pattern) for pattern in ",".join(given.freeze).split(",")
            ):
                frozen.add(name)
        self.frozen = frozenset(frozen)


def _last_match(rules: Sequence[str], called: list[str], default: float) -> float:
    """X of the last PATTERN=X that matches a tensor."""
    for rule in reversed(",".join(rules).split(",")):
        pattern, _, value = rule.partition("=")
        if fnmatch.filter(called, pattern.strip()):
            return float(value)
    return default
