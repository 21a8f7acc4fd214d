"""The flags that choose a tokenizer, in Megatron-LM's spelling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalite.preprocessing.flags import Flag
from megalite.tokenizer.choose import PATTERNS, TYPES, TokenizerSettings

TOKENIZER_FLAGS = (
    Flag("--tokenizer-type", "The tokenizer.", "ByteTokenizer", choices=tuple(TYPES)),
    Flag("--tokenizer-model", "Its SentencePiece model, ranks or tokenizer.json."),
    Flag("--vocab-file", "GPT-2's vocab.json."),
    Flag("--merge-file", "GPT-2's merges.txt."),
    Flag("--tiktoken-pattern", "How the text of ranks is split.", choices=PATTERNS),
)


def tokenizer_settings(values: Mapping[str, Any]) -> TokenizerSettings:
    """The settings that these flags stand for."""
    return TokenizerSettings(
        type=values["tokenizer_type"],
        model=values["tokenizer_model"],
        vocab_file=values["vocab_file"],
        merge_file=values["merge_file"],
        pattern=values["tiktoken_pattern"],
    )
