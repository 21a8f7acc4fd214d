"""The tokenizer of texts that are token ids already, as Megatron-LM's NullTokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from megalite.errors import DataError
from megalite.tokenizer.text import id_array

if TYPE_CHECKING:
    import numpy as np


class NullTokenizer:
    """The text "5 6 7" is the tokens 5, 6, 7; the last id of the vocabulary ends a document.

    See `Tokenizer` for the attributes. Megatron-LM's --vocab-size leaves the end of a document
    out of the count; here it is counted, as with every other tokenizer.

    Args:
        vocab_size: number of ids, at least 2.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.eod = vocab_size - 1
        self.fingerprint = f"null-{vocab_size}"

    @property
    def special(self) -> Mapping[str, int]:
        """None."""
        return {}

    @property
    def symbols(self) -> Mapping[str, int]:
        """None."""
        return {}

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:  # noqa: ARG002
        """The numbers in the text.

        Raises:
            DataError: a word that is no token id.
        """
        return [self._number(word) for word in text.split()]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The numbers in each text, int32 [tokens]."""
        return [id_array(self.encode(text)) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        """The tokens as numbers."""
        return " ".join(str(int(t)) for t in tokens)

    def _number(self, word: str) -> int:
        short = len(word) <= 20  # Python reads no number of thousands of digits
        if not (short and word.isascii() and word.isdigit() and int(word) < self.vocab_size):
            raise DataError(
                f"NullTokenizer: {word[:40]!r} is no token id from 0 to {self.vocab_size - 1}"
            )
        return int(word)
