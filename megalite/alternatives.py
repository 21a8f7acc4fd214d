"""Fields that say the same thing in two ways. No torch import."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megalite.config import fields

ALTERNATIVES = (
    ("steps", "tokens"),
    ("steps", "num_epochs"),
    ("tokens", "num_epochs"),
    ("lr_warmup_steps", "lr_warmup_fraction"),
    ("data", "mock_data"),
    ("data", "train_data_path"),
    ("mock_data", "train_data_path"),
)
"""Pairs of fields that say the same thing in two ways: only one of a pair is given."""


def has_effect(values: Mapping[str, Any], name: str) -> bool:
    """Whether values hold a field of a pair, and not only to leave it to its alternative."""
    if name == "lr_warmup_fraction":
        return name in values
    return name in values and values[name] != _default(name)


def both_given(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Alternatives of which both have an effect."""
    for pair in ALTERNATIVES:
        if all(has_effect(values, name) for name in pair):
            yield pair


def _default(name: str) -> Any:
    return next(spec.default for spec in fields() if spec.name == name)
