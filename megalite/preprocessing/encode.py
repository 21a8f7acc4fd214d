"""A chunk of records into token ids, as a worker process does it. Equal wherever it runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain

import numpy as np

from megalite.data.indexed import token_dtype
from megalite.preprocessing.reading import Bad, Chunk, Lines, Rows, too_long
from megalite.tokenizer.base import Tokenizer
from megalite.tokenizer.choose import open_tokenizer
from megalite.tokenizer.settings import TokenizerSettings

SHOWN_BAD = 5
"""How many of the records that are left out are described."""


@dataclass(frozen=True)
class Encoding:
    """What is done with every record.

    Attributes:
        tokenizer, vocab_size: which one; see `open_tokenizer`.
        keys: the field of each dataset.
        append_eod: end documents that are not empty with the end-of-document token.
        limit: longest record [bytes].
    """

    tokenizer: TokenizerSettings
    vocab_size: int
    keys: tuple[str, ...]
    append_eod: bool
    limit: int


@dataclass(frozen=True)
class Encoded:
    """Documents of one key.

    Attributes:
        tokens: of all of them, shape [sum(lengths)], in the dataset's dtype.
        lengths: of each that is not empty, int32; it is one sequence.
        sequences: 0 or 1 for each document, uint8.
        text_bytes: of their texts, as UTF-8.
        max_token: the largest id, -1 if there is none.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    sequences: np.ndarray
    text_bytes: int
    max_token: int


@dataclass(frozen=True)
class Result:
    """A chunk's documents by key, and what was left out: the first of them, and their number."""

    datasets: tuple[Encoded, ...]
    bad: tuple[Bad, ...]
    bad_count: int


def encode_chunk(encoding: Encoding, chunk: Chunk) -> Result:
    """Encode every good record of a chunk.

    A record is good if each key has a text in it; so the documents of all keys stay side by side.
    """
    texts: list[list[str]] = [[] for _ in encoding.keys]
    text_bytes = [0] * len(encoding.keys)
    bad = list(chunk.bad)
    for part in chunk.parts:
        for number, record in _records(part):
            try:
                fields = _fields(part, record, encoding)
                sizes = [len(field.encode()) for field in fields]
            except _UnfitError as error:
                bad.append(Bad(part.input, number, str(error)))
            except UnicodeEncodeError:
                bad.append(Bad(part.input, number, "holds half of a surrogate pair"))
            else:
                for i, field in enumerate(fields):
                    texts[i].append(field)
                    text_bytes[i] += sizes[i]
    tokenizer = _opened(encoding.tokenizer, encoding.vocab_size)
    return Result(
        datasets=tuple(
            _encode(tokenizer, each, size, encoding.append_eod)
            for each, size in zip(texts, text_bytes, strict=True)
        ),
        bad=tuple(sorted(bad)[:SHOWN_BAD]),
        bad_count=sum(each.count for each in bad),
    )


def _encode(tokenizer: Tokenizer, texts: list[str], text_bytes: int, append_eod: bool) -> Encoded:
    rows = tokenizer.encode_batch(texts) if texts else []
    counts = np.array([len(row) for row in rows], np.int64)
    sequences = counts > 0
    lengths = counts[sequences] + append_eod
    tokens = np.empty(lengths.sum(), token_dtype(tokenizer.vocab_size))
    is_text = np.ones(len(tokens), bool)
    if append_eod:
        last = np.cumsum(lengths) - 1
        is_text[last] = False
        tokens[last] = tokenizer.eod
    if len(tokens):
        text_tokens = np.concatenate(rows)
        assert text_tokens.min() >= 0 and text_tokens.max() < tokenizer.vocab_size
        tokens[is_text] = text_tokens
    return Encoded(
        tokens=tokens,
        lengths=lengths.astype(np.int32),
        sequences=sequences.astype(np.uint8),
        text_bytes=text_bytes,
        max_token=int(tokens.max(initial=0)) if len(tokens) else -1,
    )


class _UnfitError(Exception):
    """A record cannot be used; the message says why."""


_Record = bytes | tuple[bytes | None, ...]


def _records(part: Lines | Rows) -> Iterator[tuple[int, _Record]]:
    """Records of a part with their numbers; blank lines are none."""
    if isinstance(part, Rows):
        yield from enumerate(part.content, part.first)
        return
    ends = re.finditer(rb"\n(?:\r?\n)+" if part.form == "blank-line" else rb"\n", part.content)
    number, start = part.first, 0
    for begin, end in chain((end.span() for end in ends), [(len(part.content),) * 2]):
        record = part.content[start:begin]
        text = record.strip(b"\r\n")
        if text and not text.isspace():
            yield number + record[: record.index(text)].count(b"\n"), text
        number += part.content.count(b"\n", start, end)
        start = end


def _fields(part: Lines | Rows, record: _Record, encoding: Encoding) -> tuple[str, ...]:
    """The text of each key."""
    if isinstance(part, Rows):
        assert isinstance(record, tuple)
        if None in record:
            raise _UnfitError(f"has no text in column {encoding.keys[record.index(None)]!r}")
        return tuple(_text(field) for field in record if field is not None)
    assert isinstance(record, bytes)
    if len(record) > encoding.limit:
        raise _UnfitError(too_long(encoding.limit))
    text = _text(record)
    return _json_fields(text, encoding.keys) if part.form == "json" else (text,)


def _text(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        wrong = content[error.start]
        raise _UnfitError(f"is not UTF-8: byte 0x{wrong:02x} at {error.start}") from None


def _json_fields(line: str, keys: tuple[str, ...]) -> tuple[str, ...]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _UnfitError(f"is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise _UnfitError(f"is no JSON object but {_json_type(record)}")
    for key in keys:
        if key not in record:
            raise _UnfitError(f"has no key {key!r}")
        if not isinstance(record[key], str):
            raise _UnfitError(f"has in key {key!r} {_json_type(record[key])}, not a string")
    return tuple(record[key] for key in keys)


def _json_type(value: object) -> str:
    if isinstance(value, bool | None):
        return json.dumps(value)
    names = ((dict, "an object"), (list, "an array"), (str, "a string"))
    return next((name for kind, name in names if isinstance(value, kind)), "a number")


@cache
def _opened(settings: TokenizerSettings, vocab_size: int) -> Tokenizer:
    """The tokenizer of this process."""
    return open_tokenizer(settings, vocab_size)
