"""The flags that choose a tokenizer: those of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

from megalite.preprocessing.flags import Flag
from megalite.tokenizer.settings import TokenizerSettings

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


def tokenizer_settings(values: Mapping[str, Any]) -> TokenizerSettings:
    """The settings that these flags stand for."""
    return TokenizerSettings(**{item.name: values[item.name] for item in fields(TokenizerSettings)})
