"""Samples in Megatron-LM's order, through its three indices. No torch import."""

from __future__ import annotations

import numpy as np

from megalite.data.index_cache import Arrays, IndexCache
from megalite.data.megatron_index import build_index
from megalite.data.token_store import Piece, Span, TokenStore


class MegatronSamples:
    """As many samples of some sequences as a run asks for, over as many epochs as they take.

    Sample i is the i-th of the stream of shuffled sequences; `order` gives the place of each in the
    run. See `megatron_index`.

    Args:
        store: the dataset.
        fingerprint: of its content, for the cache.
        begin, end: the sequences of the split.
        num_samples: that the run asks for; None: those of one epoch.
        seq_length: of a sample [tokens].
        seed: of the order.
        cache: where the indices are kept.
    """

    def __init__(
        self,
        store: TokenStore,
        fingerprint: str,
        begin: int,
        end: int,
        num_samples: int | None,
        seq_length: int,
        seed: int,
        cache: IndexCache,
    ):
        self._store = store
        facts = {
            "content": fingerprint,
            "sequences": [begin, end],
            "num_samples": num_samples,
            "seq_length": seq_length,
            "seed": seed,
        }

        def build(_: Arrays) -> Arrays:
            index = build_index(store.lengths, begin, end, num_samples, seq_length, seed)
            return {
                "document_index": index.documents,
                "sample_index": index.samples,
                "shuffle_index": index.shuffle,
            }

        arrays = cache.get("megatron", facts, build)
        self._documents = arrays["document_index"]
        self._samples = arrays["sample_index"]
        self._shuffle = arrays["shuffle_index"]
        self.num_samples = len(self._shuffle)

    def describe(self) -> str:
        """Nothing."""
        return ""

    def order(self, places: np.ndarray) -> np.ndarray:
        """Samples at these places of the run, int64, shape of `places`."""
        assert places.max(initial=0) < self.num_samples, (
            f"place {places.max()} of an order of {self.num_samples} samples"
        )
        return self._shuffle[places].astype(np.int64)

    def read(self, index: int) -> np.ndarray:
        """Tokens of one sample, int64 [seq + 1]."""
        return self._store.gather(self._spans(index))

    def pieces(self, index: int) -> list[Piece]:
        """The documents that a sample consists of, in order."""
        return self._store.pieces(self._spans(index))

    def _spans(self, index: int) -> list[Span]:
        (first, start), (last, end) = self._samples[index : index + 2].tolist()
        sequences = self._documents[first : last + 1].tolist()
        store = self._store
        begins = [store.sequence_start(sequence) for sequence in sequences]
        lengths = store.lengths[sequences].tolist()
        spans = [(begin, begin + size) for begin, size in zip(begins, lengths, strict=True)]
        # The sample's last label is the first token of the next one.
        spans[-1] = (begins[-1], begins[-1] + end + 1)
        spans[0] = (begins[0] + start, spans[0][1])
        return spans
