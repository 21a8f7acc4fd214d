"""The tokens that mark the parts of a document for fill-in-the-middle. No torch or numpy import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megalite.errors import ConfigError

if TYPE_CHECKING:
    from megalite.config_data import DataConfig
    from megalite.tokenizer.base import Tokenizer

_LISTED = 8
"""Tokens of a tokenizer that a message names."""


@dataclass(frozen=True)
class Sentinels:
    """Ids of the tokens before each part."""

    prefix: int
    middle: int
    suffix: int


def find_sentinels(data: DataConfig, tokenizer: Tokenizer) -> Sentinels:
    """The tokens that the configuration names.

    Raises:
        ConfigError: names that the tokenizer does not have, or that are not three tokens apart from
            the end of a document.
    """
    problems, found = [], {}
    for part in ("prefix", "middle", "suffix"):
        text = getattr(data, f"fim_{part}_token")
        token = tokenizer.symbols.get(text)
        if token is None:
            problems.append(
                f"--fim-{part}-token {text} is no special, added or user-defined token of "
                f"{data.tokenizer}, "
                f"{_what_there_is(tokenizer)}"
            )
        else:
            found[part] = token
    if not problems and (len({*found.values()}) < 3 or tokenizer.eod in found.values()):
        names = ", ".join(f"--fim-{p}-token {getattr(data, f'fim_{p}_token')}" for p in found)
        problems.append(f"{names}: expected three tokens, none of which ends a document")
    if problems:
        raise ConfigError(problems)
    return Sentinels(**found)


def _what_there_is(tokenizer: Tokenizer) -> str:
    symbols = tokenizer.symbols
    if not symbols:
        return "which has none: give a --tokenizer-type with such tokens, or --fim-rate 0"
    # Those that may have been meant come first.
    names = sorted(symbols, key=lambda text: ("fim" not in text.lower(), text))
    more = ", ..." if len(names) > _LISTED else ""
    return f"which has {', '.join(names[:_LISTED])}{more}"
