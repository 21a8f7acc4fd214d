"""What every tokenizer does, whatever its files are. No torch import."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below it [tokens]; before any padding."""
        ...

    @property
    def eod(self) -> int:
        """The token that ends a document."""
        ...

    @property
    def special(self) -> Mapping[str, int]:
        """Special tokens by their text. Inside a document such a text is ordinary text."""
        ...

    @property
    def symbols(self) -> Mapping[str, int]:
        """Tokens that somebody named, by their text: special ones, added and user-defined ones."""
        ...

    @property
    def fingerprint(self) -> str:
        """Names the mapping: equal for tokenizers that give equal ids for every text, whatever
        their files; it is part of a tokenized corpus's identity."""
        ...

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of a text. Lone surrogates are replaced, never an error.

        Raises:
            DataError: the text has none (NullTokenizer alone).

        Args:
            text: of any length.
            allow_special: the text of a special token in it becomes that token.
        """
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text as `encode` gives them, int32 [tokens]."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the tokens; bytes that are not UTF-8 become U+FFFD."""
        ...
