"""Ranges of a dataset's tokens, and the documents they come from. No torch import."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megalite.data.indexed_reader import IndexedReader
from megalite.errors import DataError

Span = tuple[int, int]
"""Tokens [start, stop) of a dataset."""


@dataclass(frozen=True)
class Piece:
    """A part of a document in a sample.

    Attributes:
        dataset: its name.
        document: its number in the dataset.
        start, stop: tokens of the document, from 0.
    """

    dataset: str
    document: int
    start: int
    stop: int


class TokenStore:
    """The tokens of one dataset.

    Args:
        reader: of the dataset.
        name: of it, for messages.
        vocab_size: token ids must be below it.
    """

    def __init__(self, reader: IndexedReader, name: str, vocab_size: int):
        self._reader, self.name, self._vocab_size = reader, name, vocab_size
        self._token_bytes = reader.dtype.itemsize

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int32."""
        return self._reader.lengths

    def sequence_start(self, sequence: int) -> int:
        """First token of a sequence."""
        return int(self._reader.pointers[sequence]) // self._token_bytes

    def document_range(self, begin: int, end: int) -> tuple[int, int]:
        """The first document with sequences of `begin:end`, and the one behind the last."""
        documents = self._reader.documents
        first = int(np.searchsorted(documents, begin, side="right")) - 1
        return max(0, first), int(np.searchsorted(documents, end, side="left"))

    def document_bounds(self, documents: np.ndarray, begin: int, end: int) -> np.ndarray:
        """The tokens at which documents begin; a document ends where the next one begins.

        Args:
            documents: their numbers, int [n].
            begin, end: sequences; of documents that are not all in them the part that is.

        Returns:
            int64 [n].
        """
        pointers = self._reader.pointers
        sequences = np.clip(self._reader.documents[documents], begin, end)
        inside = pointers[np.minimum(sequences, len(pointers) - 1)] // self._token_bytes
        return np.where(sequences < len(pointers), inside, self._reader.num_tokens)

    def last_tokens(self, begin: int, end: int, most: int) -> np.ndarray:
        """Last tokens of documents that end in some sequences, evenly spread over them.

        Args:
            begin, end: the sequences. If none with tokens ends there the dataset's last token is
                taken: of one long document a split may hold the middle.
            most: so many documents are looked at.

        Returns:
            int [documents looked at that have tokens].
        """
        documents = self._reader.documents
        # A document that the end of the range cuts ends behind it.
        first = max(1, int(np.searchsorted(documents, begin, side="right")))
        behind = int(np.searchsorted(documents, end, side="right"))
        ends = np.arange(first, behind)
        if len(ends) > most:
            ends = np.linspace(first, behind - 1, most).astype(np.int64)
        whole = (0, len(self._reader.lengths))
        starts, stops = (self.document_bounds(each, *whole) for each in (ends - 1, ends))
        lasts = stops[stops > starts].tolist() or [self._reader.num_tokens]
        return np.concatenate([self._reader.read(max(0, stop - 1), stop) for stop in lasts])

    def gather(self, spans: Sequence[Span]) -> np.ndarray:
        """The tokens of the spans, one after the other, int64.

        Raises:
            DataError: a token id that the vocabulary does not have, or a file that was cut.
        """
        ranges = [self._reader.read(start, stop) for start, stop in spans]
        together = ranges[0] if len(ranges) == 1 else np.concatenate(ranges)
        least, most = int(together.min()), int(together.max())
        if least < 0 or most >= self._vocab_size:
            wrong = most if least >= 0 else least
            raise DataError(
                f"{self.name}: token id {wrong} near token {spans[0][0]} is outside "
                f"--vocab-size {self._vocab_size}"
            )
        return together.astype(np.int64)

    def pieces(self, spans: Sequence[Span]) -> list[Piece]:
        """The documents that the spans run through, in order."""
        return [piece for span in spans for piece in self._pieces(*span)]

    def _pieces(self, start: int, stop: int) -> list[Piece]:
        documents, pointers = self._reader.documents, self._reader.pointers
        found: list[Piece] = []
        while start < stop:
            # Documents and sequences without tokens start where the next ones do, before them.
            sequence = bisect_right(pointers, start * self._token_bytes) - 1
            document = bisect_right(documents, sequence) - 1
            first = self.sequence_start(int(documents[document]))
            behind = int(documents[document + 1])
            end = self.sequence_start(behind) if behind < len(pointers) else self._reader.num_tokens
            part = min(stop, end)
            found.append(Piece(self.name, document, start - first, part - first))
            start = part
        return found
