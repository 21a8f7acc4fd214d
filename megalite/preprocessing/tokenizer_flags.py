"""The flags that choose a tokenizer: those of a run."""

from __future__ import annotations

from dataclasses import fields
from typing import cast

from megalite.preprocessing.flags import Flag, Values
from megalite.tokenizer.settings import SOMETIMES_READ, TokenizerSettings, read_with

TOKENIZER_FLAGS = (
    *(
        Flag(
            "--" + item.name.replace("_", "-"),
            item.metadata["doc"],
            cast("str | int", item.default),
            item.metadata["choices"],
            item.metadata["metavar"],
        )
        for item in fields(TokenizerSettings)
    ),
    Flag(
        "--vocab-size",
        "Size of the vocabulary, of NullTokenizer and of the tiktoken patterns v1 and v2; that of "
        "others is in their files.",
        0,
        metavar="TOKENS",
    ),
)


def tokenizer_settings(values: Values) -> TokenizerSettings:
    """The settings that these flags stand for."""
    return TokenizerSettings(**{item.name: values[item.name] for item in fields(TokenizerSettings)})


def tokenizer_problems(values: Values) -> list[str]:
    """A sentence for each flag that the chosen tokenizer does not read."""
    settings = tokenizer_settings(values)
    unread = [name for name in (*SOMETIMES_READ, "vocab_size") if not settings.reads(name)]
    return [
        problem
        for name in unread
        for problem in values.no_effect(name, f"without {read_with(name)}")
    ]


def no_tokenizer_wanted(values: Values, otherwise: str) -> list[str]:
    """A sentence for each of these flags, where no tokenizer is used."""
    names = [item.name for item in fields(TokenizerSettings)]
    return [
        problem for name in (*names, "vocab_size") for problem in values.no_effect(name, otherwise)
    ]
