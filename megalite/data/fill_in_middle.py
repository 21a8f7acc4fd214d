"""Fill-in-the-middle: a document's middle is moved to its end, to be predicted from both sides.

Each document of a sample is, with some probability, cut at two random characters into prefix,
middle and suffix, which are tokenized anew and joined as

    PSM    <prefix> prefix <suffix> suffix <middle> middle
    SPM    <prefix> <suffix> suffix <middle> prefix middle

Then the sample is cut or padded to its length. Source of the method: Bavarian et al., "Efficient
Training of Language Models to Fill in the Middle" (2022), arXiv:2207.14255, on the level of the
context, SPM in its second variant, as in Megatron-LM's `GPTFIMDataset`. No torch import.
"""

from __future__ import annotations

import hashlib
from array import array
from typing import TYPE_CHECKING

import numpy as np

from megalite.data.samples import PADDING, DocumentSamples

if TYPE_CHECKING:
    from megalite.data.sentinels import Sentinels
    from megalite.data.token_store import Piece
    from megalite.tokenizer.base import Tokenizer

_REPLACEMENT = "\ufffd"


class FillInTheMiddle:
    """What happens to the tokens of a sample.

    Args:
        rate: of documents that are rearranged.
        spm_rate: of those, the share in the order SPM; the others are PSM.
        tokenizer: of the documents.
        sentinels: the tokens before each part.
    """

    def __init__(self, rate: float, spm_rate: float, tokenizer: Tokenizer, sentinels: Sentinels):
        self._rate, self._spm_rate = rate, spm_rate
        self._tokenizer, self._sentinels = tokenizer, sentinels
        self._around = frozenset(tokenizer.encode(""))

    def sample(self, tokens: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """A sample with some of its documents rearranged.

        Args:
            tokens: int64 [seq + 1], PADDING at the end alone.
            random: what is drawn; four numbers for each document.

        Returns:
            int64 [seq + 1]: the first so many tokens, or all and PADDING.
        """
        real = tokens[: np.count_nonzero(tokens != PADDING)].astype(np.int64, copy=False)
        ends = np.flatnonzero(real == self._tokenizer.eod)
        starts, stops = np.append(0, ends + 1), np.append(ends, len(real))
        draws = random.random((len(starts), 4))
        chosen = draws[:, 0] < self._rate
        # Of the tokens the first so many are in the sample already, rearranged or not.
        done, together = 0, array("q")
        for start, stop, (one, other, order) in zip(
            starts[chosen].tolist(), stops[chosen].tolist(), draws[chosen, 1:].tolist(), strict=True
        ):
            together.frombytes(real[done:start].tobytes())
            done = start
            if len(together) >= len(tokens):
                break
            body = real[start:stop].tolist()
            together.fromlist(self.document(body, (one, other), spm=order < self._spm_rate))
            done = stop
        together.frombytes(real[done:].tobytes())
        sample = np.full(len(tokens), PADDING, np.int64)
        kept = min(len(tokens), len(together))
        sample[:kept] = np.frombuffer(together, np.int64, kept)
        return sample

    def document(self, tokens: list[int], cuts: tuple[float, float], *, spm: bool) -> list[int]:
        """One document, rearranged.

        A document that is no text stays as it is: the start of a sample may cut through a
        character, and what is left of it could not be written again.

        Args:
            tokens: without the end of the document.
            cuts: where it is cut, in any order, as shares of it from 0 to below 1.
            spm: the order.
        """
        if not tokens:
            return tokens
        # What is put before every text stays in front; it has no text of its own.
        first = 0
        while first < len(tokens) and tokens[first] in self._around:
            first += 1
        text = self._tokenizer.decode(tokens[first:])
        if _REPLACEMENT in text:
            return tokens
        places = len(text) + 1
        start, stop = sorted((int(cuts[0] * places), int(cuts[1] * places)))
        prefix, middle, suffix = map(self._encode, (text[:start], text[start:stop], text[stop:]))
        marks = self._sentinels
        if spm:
            parts = [marks.prefix, marks.suffix, *suffix, marks.middle, *prefix, *middle]
        else:
            parts = [marks.prefix, *prefix, marks.suffix, *suffix, marks.middle, *middle]
        return [*tokens[:first], *parts]

    def _encode(self, text: str) -> list[int]:
        tokens, around = self._tokenizer.encode(text), self._around
        return [token for token in tokens if token not in around] if around else tokens


class FillInTheMiddleSamples:
    """Samples of others, rearranged.

    What is drawn follows from the seed, the data and the number of the sample, which counts over
    all epochs: it is the same in every layout and at whichever step a run begins, and new in every
    epoch.

    Args:
        samples: the others.
        transform: what happens to each.
        seed: of the run.
        fingerprint: of the data: parts of a blend draw apart.
    """

    def __init__(
        self, samples: DocumentSamples, transform: FillInTheMiddle, seed: int, fingerprint: str
    ):
        self._samples, self._transform = samples, transform
        digest = hashlib.sha256(f"fill in the middle {seed} {fingerprint}".encode()).digest()
        self._key = int.from_bytes(digest[:8], "little")
        self.num_samples = samples.num_samples

    def describe(self) -> str:
        """What the others have to say."""
        return self._samples.describe()

    def order(self, places: np.ndarray) -> np.ndarray:
        """Samples at these places of the run, int64, shape of `places`."""
        return self._samples.order(places)

    def read(self, index: int) -> np.ndarray:
        """Tokens of one sample, int64 [seq + 1].

        Raises:
            DataError: a token id that the vocabulary does not have.
        """
        random = np.random.Generator(np.random.Philox(key=[self._key, index]))
        return self._transform.sample(self._samples.read(index), random)

    def pieces(self, index: int) -> list[Piece]:
        """The documents that a sample is made of, as they are in the data."""
        return self._samples.pieces(index)
