"""The flags of every tool that reads text: which records it leaves out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from megalite.preprocessing.flags import Flag

DEFAULT_MAX_DOCUMENT_MB = 8
"""A worker that encodes a document of so many MiB had a peak of up to 557 MB with SentencePiece's
BPE (one letter without end), 450 MB with tiktoken (letters of two bytes and digits by turns)."""

_OF_TOKENIZER: Mapping[str, int] = MappingProxyType({"HuggingFaceTokenizer": 1})
"""The package tokenizers keeps words, offsets and masks for every token, and what its splits were:
up to 430 bytes for a byte of text, where every byte is a token and every character a split. A
worker that encodes a letter a line had a peak of 944 MB with 2 MiB, of 492 MB with 1 MiB."""

_LONGEST = "Longest document, and line of JSON; longer ones are left out and named."
_STRICT = Flag(
    "--strict", "Stop at a record that cannot be used, in place of leaving it out.", False
)

READING_FLAGS = (
    Flag("--max-document-mb", _LONGEST, DEFAULT_MAX_DOCUMENT_MB, metavar="MIB"),
    _STRICT,
)

ENCODING_FLAGS = (
    Flag(
        "--max-document-mb",
        f"{_LONGEST} A worker needs memory for one of them. (default: {DEFAULT_MAX_DOCUMENT_MB}; "
        + ", ".join(f"{size} with {kind}" for kind, size in _OF_TOKENIZER.items())
        + ")",
        None,
        metavar="MIB",
    ),
    _STRICT,
)
"""Of a tool that encodes what it reads; see `default_max_document_mb`."""


def default_max_document_mb(tokenizer: str) -> int:
    """Longest document [MiB] that a worker encodes within 600 MB, by the type of tokenizer."""
    return _OF_TOKENIZER.get(tokenizer, DEFAULT_MAX_DOCUMENT_MB)


def longer_documents(tokenizer: str) -> str:
    """How to have longer documents encoded, where few would expect the limit; else ""."""
    if tokenizer not in _OF_TOKENIZER:
        return ""
    return (
        "raise it, with up to 500 MB of a worker's memory for each MB, or use another "
        "--tokenizer-type"
    )


def reading_problems(max_document_mb: int) -> Iterator[str]:
    """A sentence if the limit is none."""
    if not 1 <= max_document_mb <= 1024:
        yield f"--max-document-mb {max_document_mb}: from 1 to 1024"
