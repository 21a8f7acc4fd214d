"""The byte-level tokenizer: 256 bytes and the end-of-document token. It needs no file."""

from __future__ import annotations

from collections.abc import Iterable


class ByteTokenizer:
    """Token b is the byte b; token 256 ends a document.

    Attributes:
        vocab_size: 257 [tokens].
        eod: the end-of-document token.
        fingerprint: names the mapping; it is part of a tokenized corpus's identity.
    """

    vocab_size = 257
    eod = 256
    fingerprint = "byte-257"

    def encode(self, text: str) -> list[int]:
        """UTF-8 bytes of the text (lone surrogates as Python's `surrogatepass` writes them)."""
        return list(text.encode("utf-8", "surrogatepass"))

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the tokens; bytes that are not UTF-8 become U+FFFD, other ids are dropped."""
        return bytes(t for t in tokens if t < 256).decode("utf-8", "replace")
