"""Tokenizers of the sentencepiece library (Kudo and Richardson 2018)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from megalite.errors import DataError
from megalite.tokenizer.files import read_bytes
from megalite.tokenizer.text import id_array, well_formed

if TYPE_CHECKING:
    import numpy as np


class SentencePieceTokenizer:
    """A SentencePiece model. See `Tokenizer` for the attributes.

    A document ends with the model's end of sentence, </s>. Special tokens are the model's control
    symbols; its user-defined symbols are ordinary tokens, found in every text.

    With `bos` every text begins with the model's beginning of sentence, also an empty one: so does
    Megatron-LM's own Llama2Tokenizer (`megatron.training.tokenizer`). Its GPTSentencePieceTokenizer
    puts nothing there, nor do the newer `megatron.core.tokenizers` under any name.
    SentencePieceTokenizer is the newer one: the older adds <CLS>, <SEP>, <EOD> and <MASK> to the
    model's pieces, and ends documents with that <EOD>.

    Args:
        path: the .model file.
        bos: begin each text with <s>.

    Raises:
        DataError: no SentencePiece model, or one without </s>, or without <s> where it is wanted.
    """

    def __init__(self, path: str, *, bos: bool):
        import sentencepiece

        content = read_bytes(path)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError:
            raise DataError(f"{path} is no SentencePiece model, or it is damaged") from None
        model = self._model
        self.vocab_size: int = model.get_piece_size()
        pieces = {model.id_to_piece(i): i for i in range(self.vocab_size)}
        if not self.vocab_size == len(pieces) == model.vocab_size():
            raise DataError(
                f"{path} is damaged: {self.vocab_size} pieces, {len(pieces)} of them different, "
                f"for a vocabulary of {model.vocab_size()}"
            )
        self.eod: int = model.eos_id()
        if self.eod < 0:
            raise DataError(f"{path} has no end of sentence (</s>), with which a document ends")
        if bos and model.bos_id() < 0:
            raise DataError(f"{path} has no beginning of sentence (<s>), with which a text begins")
        self._before = [model.bos_id()] if bos else []
        self._content = content
        self.special: Mapping[str, int] = MappingProxyType(
            {piece: i for piece, i in pieces.items() if model.is_control(i)}
        )

    @property
    def symbols(self) -> Mapping[str, int]:
        """The control symbols and the user-defined ones."""
        model = self._model
        named = user_defined(self._content)
        return {**self.special, **{piece: model.piece_to_id(piece) for piece in named}}

    @cached_property
    def fingerprint(self) -> str:
        """Names the mapping: the model file's content, and what a text begins with."""
        digest = hashlib.sha256(f"sentencepiece 1 {self._before}".encode() + self._content)
        return f"sentencepiece-{digest.hexdigest()[:16]}"

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of a text; see `Tokenizer`."""
        text = well_formed(text)
        if not (allow_special and self.special):
            return self._before + self._model.encode(text)
        longest_first = sorted(self.special, key=len, reverse=True)
        # An odd number of parts: every second one is special.
        parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
        ids = list(self._before)
        for number, part in enumerate(parts):
            ids += [self.special[part]] if number % 2 else self._model.encode(part)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 [tokens]; on this thread alone."""
        rows = self._model.encode([well_formed(text) for text in texts], num_threads=1)
        return [id_array(self._before + row) for row in rows]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the tokens as the library writes it; ids that the model lacks are dropped."""
        known = list(map(int, tokens))
        if known and not 0 <= min(known) <= max(known) < self.vocab_size:
            known = [t for t in known if 0 <= t < self.vocab_size]
        return self._model.decode(known)


_PIECE, _TEXT, _TYPE = 1, 1, 3
"""Fields of sentencepiece_model.proto: a model's pieces, and of a piece its text and type."""
_USER_DEFINED = 4


def user_defined(content: bytes) -> list[str]:
    """User-defined symbols of a model file; the library's Python interface does not tell them."""
    pieces = (
        dict(message_fields(part)) for number, part in message_fields(content) if number == _PIECE
    )
    return [str(piece[_TEXT], "utf-8") for piece in pieces if piece.get(_TYPE) == _USER_DEFINED]


def message_fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protobuf message."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = content[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(content):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        yield number, content[at : at + size]
        at += size
