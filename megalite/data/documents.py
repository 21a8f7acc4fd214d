"""Where documents begin inside samples, from the tokens that end them.

As in Megatron-LM the end-of-document token is the last of its document, and the start of a sample
starts a document whether one begins there or not.
"""

from __future__ import annotations

import numpy as np


def document_starts(tokens: np.ndarray, eod: int) -> np.ndarray:
    """The position at which the document of each token begins.

    Args:
        tokens: int64 [..., S], the inputs of samples.
        eod: the token that ends a document.

    Returns:
        int64 [..., S].
    """
    begins = np.zeros(tokens.shape, bool)
    begins[..., 1:] = tokens[..., :-1] == eod
    positions = np.arange(tokens.shape[-1])
    return np.maximum.accumulate(np.where(begins, positions, 0), axis=-1)


def document_bounds(starts: np.ndarray) -> tuple[np.ndarray, int]:
    """The documents of a micro-batch as one row of tokens.

    Args:
        starts: [B, S], of `document_starts`.

    Returns:
        int32 [documents + 1], where each begins in the flattened [B S], and the end; and the number
        of tokens of the longest.
    """
    first = np.flatnonzero(starts == np.arange(starts.shape[-1]))
    bounds = np.append(first, starts.size).astype(np.int32)
    return bounds, int(np.diff(bounds).max())
