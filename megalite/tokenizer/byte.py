"""The byte-level tokenizer: 256 bytes and the end-of-document token. It needs no file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


class ByteTokenizer:
    """Token b is the byte b; token 256 ends a document. See `Tokenizer` for the attributes."""

    vocab_size = 257
    eod = 256
    fingerprint = "byte-257"

    @property
    def special(self) -> Mapping[str, int]:
        """None: the end of a document has no text that one could write."""
        return {}

    @property
    def symbols(self) -> Mapping[str, int]:
        """None."""
        return {}

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:  # noqa: ARG002
        """UTF-8 bytes of the text (lone surrogates as Python's `surrogatepass` writes them)."""
        return list(text.encode("utf-8", "surrogatepass"))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """UTF-8 bytes of each text, int32 [bytes]."""
        import numpy as np

        rows = (text.encode("utf-8", "surrogatepass") for text in texts)
        return [np.frombuffer(row, np.uint8).astype(np.int32) for row in rows]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the tokens; bytes that are not UTF-8 become U+FFFD, other ids are dropped."""
        return bytes(t for t in tokens if t < 256).decode("utf-8", "replace")
