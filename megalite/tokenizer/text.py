"""Text that every library takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def well_formed(text: str) -> str:
    """The text with surrogate pairs joined and lone surrogates replaced by U+FFFD.

    It is what tiktoken does with such a text; sentencepiece and tokenizers refuse it.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def id_array(ids: Sequence[int]) -> np.ndarray:
    """Token ids as int32 [tokens]; numpy is imported where many are made, not with a tokenizer."""
    import numpy as np

    return np.fromiter(ids, np.int32, len(ids))  # a third faster than np.array
