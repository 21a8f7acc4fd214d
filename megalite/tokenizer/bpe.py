"""Byte-level BPE: a pattern splits the text into pieces, merges make tokens of their bytes.

Every text has tokens, and `decode` gives it back. Python's own `re` splits what is ASCII, the
`regex` package all other text; the merges are `megalite.tokenizer.merges`. Where tiktoken is
installed it does the work of rank files, with the same tokens; only characters that are new in the
Unicode version of one of the two libraries and unknown to the other are split differently (regex
2026 knows Unicode 17, tiktoken 0.14 Unicode 16).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from itertools import chain, repeat
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import regex

from megalite.errors import ConfigError, DataError
from megalite.tokenizer.files import read_gpt2, read_ranks
from megalite.tokenizer.merges import Merges, merges_of_pairs, merges_of_ranks
from megalite.tokenizer.patterns import GPT2_PATTERN, LEAST_SPECIAL_TOKENS, STYLES, for_ascii
from megalite.tokenizer.text import id_array, well_formed

if TYPE_CHECKING:
    import numpy as np

Engine = Literal["auto", "regex", "tiktoken"]

MEGATRON_VOCAB_SIZE = 1 << 17
"""Megatron-LM's vocabulary for its patterns v1 and v2 where --vocab-size is not given."""

_CHUNK_CHARACTERS = 1 << 16
"""A long text is split so often, to hold few of its pieces at a time."""

_TIKTOKEN_CHARACTERS = 100_000
"""Longer texts without a place to split are not given to tiktoken: its regular expressions run out
of stack somewhere between these and a million white-space characters."""

_PART_CHARACTERS = 1 << 8
"""Text that is not all ASCII is split so often, to find the parts that are: they are faster."""

_KEPT = 1 << 16
_KEPT_CHARACTERS = 32
"""Tokens are remembered for so many pieces up to this length; then all are forgotten."""

_SPLIT_POINT = regex.compile(r"(?<=\S) ")
"""A piece begins there with every pattern of `patterns`, whatever stands around."""


class BytePairTokenizer:
    """See `Tokenizer` for the attributes, `gpt2_tokenizer` and `rank_tokenizer` for the files.

    No token is put before a text, as in Megatron-LM's classes.

    Args:
        pattern: splits text into pieces.
        tokens: ids by bytes, without the special tokens.
        pairs: the merges; None: the ids are ranks (`merges_of_ranks`), and a piece that is a
            token is that token even if no merges lead to it, as in tiktoken.
        special: ids of special tokens by text.
        eod: ends a document.
        engine: what works: "tiktoken" (ranks only), "regex", or the first of them that is there.

    Raises:
        ConfigError: tiktoken was asked for and is not installed.
    """

    def __init__(
        self,
        pattern: str,
        tokens: Mapping[bytes, int],
        pairs: Sequence[tuple[bytes, bytes]] | None,
        special: Mapping[str, int],
        eod: int,
        engine: Engine = "auto",
    ):
        self.special = MappingProxyType(dict(special))
        self.eod = eod
        self.vocab_size = 1 + max(*tokens.values(), *special.values())
        self._pattern, self._tokens, self._pairs = pattern, tokens, pairs
        installed = find_spec("tiktoken") is not None
        if engine == "tiktoken" and not installed:
            raise ConfigError("tiktoken is not installed: pip install tiktoken")
        self._find = regex.compile(pattern).findall
        self._find_in_ascii = re.compile(for_ascii(pattern)).findall
        self._use_tiktoken = engine != "regex" and installed and pairs is None

    @property
    def symbols(self) -> Mapping[str, int]:
        """The special tokens: rank files and GPT-2's name no others."""
        return self.special

    @cached_property
    def fingerprint(self) -> str:
        """Names the mapping: the pattern, the tokens, the merges, the special tokens."""
        digest = hashlib.sha256(f"byte pairs 1 {self._pattern!r} {self.eod}".encode())
        for token, number in sorted(self._tokens.items(), key=lambda item: item[1]):
            digest.update(b"%d %s\n" % (number, token.hex().encode()))
        for text, number in sorted(self.special.items()):
            digest.update(f"{text!r} {number}\n".encode())
        for left, right in self._pairs or ():
            digest.update(f"{left.hex()} {right.hex()}\n".encode())
        return f"bpe-{digest.hexdigest()[:16]}"

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of a text; see `Tokenizer`."""
        text = well_formed(text)
        if not allow_special:
            return self._encode(text)
        ids: list[int] = []
        start = 0
        for match in self._find_special(text):
            ids += self._encode(text[start : match.start()])
            ids.append(self.special[match.group()])
            start = match.end()
        return ids + self._encode(text[start:])

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 [tokens]; on this thread alone."""
        return [self._encode_array(text) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the tokens; bytes that are not UTF-8 become U+FFFD, unknown ids are dropped."""
        return b"".join(map(self._bytes.get, tokens, repeat(b""))).decode("utf-8", "replace")

    def _encode(self, text: str) -> list[int]:
        """Tokens of a well-formed text without special ones."""
        if len(text) <= _CHUNK_CHARACTERS:
            return self._encode_chunk(text)
        return list(
            chain.from_iterable(map(self._encode_chunk, split_points(text, _CHUNK_CHARACTERS)))
        )

    def _encode_array(self, text: str) -> np.ndarray:
        """Tokens of a text, int32 [tokens]; by tiktoken without a Python number for each."""
        if len(text) <= _CHUNK_CHARACTERS:
            return self._encode_chunk_array(text)
        import numpy as np

        parts = split_points(text, _CHUNK_CHARACTERS)
        return np.concatenate([self._encode_chunk_array(part) for part in parts])

    def _encode_chunk_array(self, text: str) -> np.ndarray:
        if self._use_tiktoken and len(text) <= _TIKTOKEN_CHARACTERS:
            try:
                ids = self._encoding.encode_to_numpy(text, disallowed_special=())
            except UnicodeEncodeError:
                ids = self._encoding.encode_to_numpy(well_formed(text), disallowed_special=())
            return ids.view("int32")
        return id_array(self._encode_chunk(well_formed(text)))

    def _encode_chunk(self, text: str) -> list[int]:
        if self._use_tiktoken and len(text) <= _TIKTOKEN_CHARACTERS:
            return self._encoding.encode_ordinary(text)
        return list(chain.from_iterable(map(self._pieces.__getitem__, self._find_pieces(text))))

    def _find_pieces(self, text: str) -> Iterable[str]:
        """Pieces of a text."""
        if text.isascii():
            return self._find_in_ascii(text)
        parts = split_points(text, _PART_CHARACTERS)
        finds = (self._find_in_ascii(p) if p.isascii() else self._find(p) for p in parts)
        return chain.from_iterable(finds)

    # Each of these is built when it is first needed: the size of a vocabulary needs none.

    @cached_property
    def _encoding(self) -> Any:
        import tiktoken

        return tiktoken.Encoding(
            name="megalite",
            pat_str=self._pattern,
            mergeable_ranks=dict(self._tokens),
            # None is ever looked for, but tiktoken needs one; a thousand would take it more time.
            special_tokens={next(t for t, i in self.special.items() if i == self.eod): self.eod},
        )

    @cached_property
    def _pieces(self) -> _Pieces:
        if self._pairs is None:
            return _Pieces(self._tokens, merges_of_ranks(self._tokens))
        return _Pieces({}, merges_of_pairs(self._tokens, self._pairs))

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        special = {number: text.encode() for text, number in self.special.items()}
        return {**{number: token for token, number in self._tokens.items()}, **special}

    def _find_special(self, text: str) -> Iterator[regex.Match[str]]:
        """Special tokens in a text; of those that begin alike the longest."""
        longest_first = sorted(self.special, key=len, reverse=True)
        return regex.finditer("|".join(map(regex.escape, longest_first)), text)


class _Pieces(dict[str, list[int]]):
    """Tokens of pieces of text; those of short pieces are remembered.

    Args:
        whole: pieces that are tokens as they are.
        merges: what happens to the others.
    """

    def __init__(self, whole: Mapping[bytes, int], merges: Merges):
        super().__init__()
        self._whole, self._merges = whole, merges

    def __missing__(self, piece: str) -> list[int]:
        content = piece.encode()
        token = self._whole.get(content)
        ids = self._merges.merge(content) if token is None else [token]
        if len(piece) <= _KEPT_CHARACTERS:
            if len(self) >= _KEPT:
                self.clear()
            self[piece] = ids
        return ids


def split_points(text: str, characters: int) -> Iterator[str]:
    """Parts of so many characters, or somewhat more, whose tokens, one after the other, are those
    of the text."""
    start = 0
    while match := _SPLIT_POINT.search(text, start + characters):
        yield text[start : match.start()]
        start = match.start()
    yield text[start:]


def gpt2_tokenizer(vocab_file: str, merge_file: str) -> BytePairTokenizer:
    """GPT-2's tokenizer, as Megatron-LM's GPT2BPETokenizer: a document ends with <|endoftext|>.

    Args:
        vocab_file: vocab.json.
        merge_file: merges.txt.

    Raises:
        DataError: unreadable or malformed files, or no <|endoftext|> in them.
    """
    special, tokens, pairs = read_gpt2(vocab_file, merge_file)
    if "<|endoftext|>" not in special:
        raise DataError(f"{vocab_file} has no <|endoftext|>, with which a document ends")
    return BytePairTokenizer(GPT2_PATTERN, tokens, pairs, special, special["<|endoftext|>"])


def rank_tokenizer(
    path: str,
    pattern: str,
    num_special_tokens: int = 1000,
    vocab_size: int = 0,
    engine: Engine = "auto",
) -> BytePairTokenizer:
    """The tokenizer of a rank file, as Megatron-LM's TikTokenizer for its patterns v1 and v2.

    Those put `num_special_tokens` before the ranks, take as many ranks as fill the vocabulary and
    end a document with </s>, id 2. The other patterns put their vocabulary's own special tokens
    behind the ranks; <|endoftext|>, or <|end_of_text|> for LLaMA 3, ends a document.

    Args:
        path: see `read_ranks`.
        pattern: a name in `STYLES`.
        num_special_tokens: for v1 and v2.
        vocab_size: for v1 and v2, with the special tokens; 0: 131072, or all that the file has.
        engine: see `BytePairTokenizer`.

    Raises:
        ConfigError: an unreadable or malformed file, a number of special tokens that cannot be,
            or fewer ranks than `vocab_size` asks for.
    """
    style = STYLES[pattern]
    ranks = read_ranks(path)
    if style.special_first:
        wanted = (vocab_size or MEGATRON_VOCAB_SIZE) - num_special_tokens
        if not LEAST_SPECIAL_TOKENS <= num_special_tokens <= MEGATRON_VOCAB_SIZE - 256:
            raise ConfigError(
                f"--tiktoken-num-special-tokens {num_special_tokens} must be from "
                f"{LEAST_SPECIAL_TOKENS} to {MEGATRON_VOCAB_SIZE - 256}"
            )
        if vocab_size and not 256 <= wanted <= len(ranks):
            raise DataError(
                f"{path} has {len(ranks)} ranks: with {num_special_tokens} special tokens before "
                f"them, --vocab-size {vocab_size} must be from {num_special_tokens + 256} to "
                f"{num_special_tokens + len(ranks)}"
            )
        ranks = {t: rank + num_special_tokens for t, rank in ranks.items() if rank < wanted}
    special = style.special(1 + max(ranks.values()), num_special_tokens)
    return BytePairTokenizer(style.pattern, ranks, None, special, special[style.eod], engine)
