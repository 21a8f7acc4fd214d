"""What says which tokenizer it is: fields of a configuration, flags of a tool.

Types have Megatron-LM's names. They do what its own classes of these names do
(`megatron.training.tokenizer`), but for SentencePieceTokenizer, which is as in the newer
`megatron.core.tokenizers`: see the docstring of each, and `docs/megatron_flags.md`. No torch or
numpy import.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megalite.option import option

TYPES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "ByteTokenizer": (),
        "SentencePieceTokenizer": ("tokenizer_model",),
        "GPTSentencePieceTokenizer": ("tokenizer_model",),
        "Llama2Tokenizer": ("tokenizer_model",),
        "GPT2BPETokenizer": ("vocab_file", "merge_file"),
        "TikTokenizer": ("tokenizer_model", "tiktoken_pattern"),
        "HuggingFaceTokenizer": ("tokenizer_model",),
        "NullTokenizer": ("vocab_size",),
    }
)
"""The types, and the fields that each needs."""

PATTERNS = ("gpt2", "cl100k_base", "o200k_base", "llama3", "v1", "v2")
"""How the text of a rank file is split."""

MEGATRON_PATTERNS = frozenset({"v1", "v2"})
"""Of Megatron-LM: special tokens before the ranks, and a size that says how many ranks count."""

SOMETIMES_READ = (
    *("tokenizer_model", "vocab_file", "merge_file"),
    *("tiktoken_pattern", "tiktoken_num_special_tokens"),
)
"""Settings that only some tokenizers read."""

_RANKS = frozenset({"vocab_size", "tiktoken_num_special_tokens"})
"""What Megatron-LM's patterns read, and no other pattern."""


@dataclass(frozen=True)
class TokenizerSettings:
    """The tokenizer's type and files."""

    tokenizer_type: str = option(
        "auto",
        f"Tokenizer of the text: {', '.join(TYPES)}. auto: ByteTokenizer for text, none for a "
        ".bin/.idx.",
        metavar="TYPE",
        choices=("auto", *TYPES),
    )
    tokenizer_model: str = option(
        "", "SentencePiece model, tiktoken ranks, or tokenizer.json.", metavar="FILE"
    )
    vocab_file: str = option("", "GPT-2's vocab.json.", metavar="FILE")
    merge_file: str = option("", "GPT-2's merges.txt.", metavar="FILE")
    tiktoken_pattern: str = option(
        "",
        "How the text of tiktoken ranks is split, and their special tokens: one of "
        f"{', '.join(PATTERNS)}.",
        metavar="NAME",
    )
    tiktoken_num_special_tokens: int = option(
        1000, "Tokens before the ranks, with the patterns v1 and v2.", metavar="TOKENS"
    )

    @property
    def tokenizer(self) -> str:
        """The type in use."""
        return "ByteTokenizer" if self.tokenizer_type == "auto" else self.tokenizer_type

    def reads(self, name: str) -> bool:
        """Whether the tokenizer reads a field of these, or `vocab_size`."""
        by_pattern = name in _RANKS and self.tiktoken_pattern in MEGATRON_PATTERNS
        return by_pattern or name in TYPES[self.tokenizer]


def read_with(name: str) -> str:
    """The flags under which a field is read, as the rest of a sentence."""
    types = [kind for kind, needed in TYPES.items() if name in needed]
    flags = [f"--tokenizer-type {' or '.join(types)}"] if types else []
    if name in _RANKS:
        flags.append(f"--tiktoken-pattern {' or '.join(sorted(MEGATRON_PATTERNS))}")
    return " or ".join(flags)
