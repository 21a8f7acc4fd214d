"""The one place that knows all tokenizers: from settings to a `Tokenizer`.

No torch or numpy import; a tokenizer's own library is imported when one is opened.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megalite.errors import ConfigError
from megalite.tokenizer.byte import ByteTokenizer
from megalite.tokenizer.settings import PATTERNS, TYPES, TokenizerSettings

if TYPE_CHECKING:
    from megalite.tokenizer.base import Tokenizer
    from megalite.tokenizer.bpe import Engine


def open_tokenizer(
    settings: TokenizerSettings, vocab_size: int = 0, *, engine: Engine = "auto"
) -> Tokenizer:
    """The tokenizer that the settings name.

    Args:
        settings: of a valid type.
        vocab_size: for NullTokenizer, and for TikTokenizer with Megatron-LM's patterns
            [tokens]; 0: not given. Other tokenizers have a size of their own.
        engine: what does the work of a rank file; see `BytePairTokenizer`.

    Raises:
        ConfigError: a setting or a package is missing, a file is unreadable or damaged.
    """
    if problems := list(_problems(settings, vocab_size)):
        raise ConfigError(problems)
    kind, model = settings.tokenizer, settings.tokenizer_model
    if kind == "ByteTokenizer":
        return ByteTokenizer()
    if kind == "NullTokenizer":
        from megalite.tokenizer.null import NullTokenizer

        return NullTokenizer(vocab_size)
    if kind == "HuggingFaceTokenizer":
        from megalite.tokenizer.hf import HuggingFaceTokenizer

        return HuggingFaceTokenizer(model)
    if kind == "GPT2BPETokenizer":
        from megalite.tokenizer.bpe import gpt2_tokenizer

        return gpt2_tokenizer(settings.vocab_file, settings.merge_file)
    if kind == "TikTokenizer":
        from megalite.tokenizer.bpe import rank_tokenizer

        special = settings.tiktoken_num_special_tokens
        return rank_tokenizer(model, settings.tiktoken_pattern, special, vocab_size, engine)
    from megalite.tokenizer.sentencepiece import SentencePieceTokenizer

    return SentencePieceTokenizer(model, bos=kind == "Llama2Tokenizer")


def _problems(settings: TokenizerSettings, vocab_size: int) -> Iterator[str]:
    """What the type needs and the settings do not say."""
    given = {**vars(settings), "vocab_size": vocab_size}
    for name in TYPES[settings.tokenizer]:
        if not given[name]:
            hint = f", one of {', '.join(PATTERNS)}" if name == "tiktoken_pattern" else ""
            flag = name.replace("_", "-")
            yield f"--tokenizer-type {settings.tokenizer} needs --{flag}{hint}"
    pattern = settings.tiktoken_pattern
    if settings.tokenizer == "TikTokenizer" and pattern and pattern not in PATTERNS:
        near = difflib.get_close_matches(pattern, PATTERNS, n=1, cutoff=0.5)
        yield (
            f"--tiktoken-pattern {pattern}: expected one of {', '.join(PATTERNS)}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    if settings.tokenizer == "NullTokenizer" and vocab_size == 1:
        yield "--vocab-size 1 is the end of a document alone: give at least 2"
