"""The one place that knows all tokenizers: from settings to a `Tokenizer`.

Types have Megatron-LM's names and do what its classes of these names do (megatron.training, its
tokenizers up to core 0.13): see the docstring of each. No torch or numpy import; a tokenizer's own
library is imported when one is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from megalite.errors import ConfigError
from megalite.tokenizer.byte import ByteTokenizer

if TYPE_CHECKING:
    from megalite.tokenizer.base import Tokenizer
    from megalite.tokenizer.bpe import Engine

PATTERNS = ("gpt2", "cl100k_base", "o200k_base", "llama3", "v1", "v2")
"""Of rank files; v1 and v2 are Megatron-LM's."""

MEGATRON_PATTERNS = frozenset({"v1", "v2"})


@dataclass(frozen=True)
class TokenizerSettings:
    """What says which tokenizer it is.

    Attributes:
        type: a name in `TYPES`; "" is ByteTokenizer.
        model: file of a SentencePiece model, of ranks, or tokenizer.json.
        vocab_file, merge_file: GPT-2's vocab.json and merges.txt.
        pattern: how the text of a rank file is split; a name in `PATTERNS`.
        num_special_tokens: before the ranks, with Megatron-LM's patterns.
        vocab_size: for those patterns and NullTokenizer [tokens]; 0: not given.
    """

    type: str = ""
    model: str = ""
    vocab_file: str = ""
    merge_file: str = ""
    pattern: str = ""
    num_special_tokens: int = 1000
    vocab_size: int = 0


TYPES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "ByteTokenizer": (),
        "SentencePieceTokenizer": ("model",),
        "GPTSentencePieceTokenizer": ("model",),
        "Llama2Tokenizer": ("model",),
        "GPT2BPETokenizer": ("vocab_file", "merge_file"),
        "TikTokenizer": ("model", "pattern"),
        "HuggingFaceTokenizer": ("model",),
        "NullTokenizer": ("vocab_size",),
    }
)
"""The settings that each type needs."""

FLAGS: Mapping[str, str] = MappingProxyType(
    {
        "model": "--tokenizer-model",
        "vocab_file": "--vocab-file",
        "merge_file": "--merge-file",
        "pattern": "--tiktoken-pattern",
        "vocab_size": "--vocab-size",
    }
)
"""Their flags, in Megatron-LM's spelling."""


def missing_settings(settings: TokenizerSettings) -> list[str]:
    """A sentence for each setting that the type needs and that is not given."""
    hints = {"pattern": f" (one of {', '.join(PATTERNS)})"}
    return [
        f"--tokenizer-type {settings.type} needs {FLAGS[name]}{hints.get(name, '')}"
        for name in TYPES[settings.type or "ByteTokenizer"]
        if not getattr(settings, name)
    ]


def open_tokenizer(settings: TokenizerSettings, *, engine: Engine = "auto") -> Tokenizer:
    """The tokenizer that the settings name.

    Args:
        settings: the type and pattern are valid names.
        engine: what does the work of a rank file; see `BytePairTokenizer`.

    Raises:
        ConfigError: a setting or a package is missing, a file is unreadable or damaged.
    """
    if missing := missing_settings(settings):
        raise ConfigError(missing)
    if settings.type == "NullTokenizer":
        from megalite.tokenizer.null import NullTokenizer

        return NullTokenizer(settings.vocab_size)
    if settings.type == "HuggingFaceTokenizer":
        from megalite.tokenizer.hf import HuggingFaceTokenizer

        return HuggingFaceTokenizer(settings.model)
    if settings.type == "GPT2BPETokenizer":
        from megalite.tokenizer.bpe import gpt2_tokenizer

        return gpt2_tokenizer(settings.vocab_file, settings.merge_file)
    if settings.type == "TikTokenizer":
        from megalite.tokenizer.bpe import rank_tokenizer

        return rank_tokenizer(
            settings.model,
            settings.pattern,
            settings.num_special_tokens,
            settings.vocab_size,
            engine,
        )
    if settings.type in ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"):
        from megalite.tokenizer.sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer(settings.model, bos=settings.type == "Llama2Tokenizer")
    return ByteTokenizer()
