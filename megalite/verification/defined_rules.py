"""What options of the update mean, written for reading: a part of the definition."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from statistics import fmean, pstdev

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


class DefinedSpikes:
    """Which steps stand out of the ones before them.

    Args:
        config: resolved.
    """

    def __init__(self, config: Config):
        self._deviations, self._window = config.train.skip_spikes, config.train.spike_window
        self._seen: list[tuple[float, float]] = []

    def stands_out(self, norm: float, loss: float) -> bool:
        """Whether a step is skipped for its gradient norm or its loss, which are remembered."""
        last = self._seen[-self._window :]
        self._seen.append((norm, loss))
        if not self._deviations or len(last) < self._window:
            return False
        return any(
            figure > fmean(before) + self._deviations * pstdev(before)
            for figure, before in zip((norm, loss), zip(*last, strict=True), strict=True)
        )


def _last_match(rules: Sequence[str], called: list[str], default: float) -> float:
    """X of the last PATTERN=X that matches a tensor."""
    for rule in reversed(",".join(rules).split(",")):
        pattern, _, value = rule.partition("=")
        if fnmatch.filter(called, pattern.strip()):
            return float(value)
    return default
