"""Records of a chunk as texts, and sentences about those that cannot be used."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from megalite.errors import DataError
from megalite.reading.chunks import Bad, Chunk, Lines, Rows, too_long
from megalite.reading.inputs import Input
from megalite.wording import counted

if TYPE_CHECKING:
    import numpy as np

    from megalite.tokenizer.base import Tokenizer

orjson_loads: Callable[[bytes], Any] | None
try:
    from orjson import loads as orjson_loads
except ImportError:
    orjson_loads = None

SHOWN_BAD = 5
"""How many of the records that are left out are described."""

_NEVER_TOO_DEEP = 200
"""Opening brackets. Of a record that nests more of them, Python's json may run out of stack."""


def texts(
    chunk: Chunk,
    keys: tuple[str, ...],
    limit: int,
    *,
    check: Callable[[str], object] | None = None,
) -> tuple[list[tuple[str, ...]], list[Bad]]:
    """Every good record of a chunk, and those that are left out, both in order.

    A record is good if each key has a text in it; so the documents of all keys stay side by side.

    Args:
        chunk: of records.
        keys: the fields wanted of each record.
        limit: longest record [bytes].
        check: is called with every text; one for which it raises DataError is left out.

    Returns:
        Of each good record the text of each key.
    """
    good: list[tuple[str, ...]] = []
    bad = list(chunk.bad)
    for part in chunk.parts:
        for number, record in _records(part):
            try:
                fields = _fields(part, record, keys, limit)
                if check is not None:
                    for text in fields:
                        check(text)
                good.append(fields)
            except _UnfitError as error:
                bad.append(Bad(part.input, number, str(error)))
            except DataError as error:
                bad.append(Bad(part.input, number, f"has no tokens: {error.violations[0]}"))
    return good, sorted(bad)


def encoded(
    chunk: Chunk, keys: tuple[str, ...], limit: int, tokenizer: Tokenizer
) -> tuple[list[tuple[str, ...]], list[list[np.ndarray]], list[Bad]]:
    """As `texts`, where a record without tokens is no good one either.

    Returns:
        The text of each key of each good record, the token ids of the texts of each key, int32,
        and the records that are left out.
    """

    def columns(good: list[tuple[str, ...]]) -> list[list[np.ndarray]]:
        by_key = zip(*good, strict=True) if good else [()] * len(keys)
        return [tokenizer.encode_batch(column) if column else [] for column in by_key]

    good, bad = texts(chunk, keys, limit)
    try:
        return good, columns(good), bad
    except DataError:
        # Some text is none for this tokenizer; which one, each alone tells.
        good, bad = texts(chunk, keys, limit, check=tokenizer.encode)
        return good, columns(good), bad


def sentences(bad: Sequence[Bad], inputs: Sequence[Input]) -> tuple[str, ...]:
    """Which records they are, and why they are left out; of the first `SHOWN_BAD`."""
    return tuple(_sentence(each, inputs[each.input]) for each in bad[:SHOWN_BAD])


def _sentence(bad: Bad, source: Input) -> str:
    unit = "row" if source.kind == "parquet" else "line"
    if not bad.record:
        return f"{source.path} {bad.why}"
    records = f"{unit} {bad.record}" if bad.count == 1 else f"each of its {bad.count} {unit}s"
    return f"{source.path}: {records} {bad.why}"


def left_out(count: int, examples: Sequence[str]) -> list[str]:
    """Lines about the records that were left out; none if there were none.

    Args:
        count: of all of them.
        examples: sentences about the first.
    """
    if not count:
        return []
    were = "was" if count == 1 else "were"
    more = ["  ... (--strict makes the first one an error)"] if count > len(examples) else []
    return [
        f"{counted(count, 'record')} {were} left out:",
        *(f"  {each}" for each in examples),
        *more,
    ]


class _UnfitError(Exception):
    """A record cannot be used; the message says why."""


_Record = bytes | tuple[bytes | None, ...]


def _records(part: Lines | Rows) -> Iterator[tuple[int, _Record]]:
    """Records of a part with their numbers; blank lines are none."""
    if isinstance(part, Rows):
        yield from enumerate(part.content, part.first)
        return
    if part.form != "blank-line":
        for number, line in enumerate(part.content.split(b"\n"), part.first):
            text = line.strip(b"\r")
            if text and not text.isspace():
                yield number, text
        return
    ends = re.finditer(rb"\n(?:\r?\n)+", part.content)
    number, start = part.first, 0
    for begin, end in chain((end.span() for end in ends), [(len(part.content),) * 2]):
        record = part.content[start:begin]
        text = record.strip(b"\r\n")
        if text and not text.isspace():
            yield number + record[: record.index(text)].count(b"\n"), text
        number += part.content.count(b"\n", start, end)
        start = end


def _fields(
    part: Lines | Rows, record: _Record, keys: tuple[str, ...], limit: int
) -> tuple[str, ...]:
    """The text of each key."""
    if isinstance(part, Rows):
        assert isinstance(record, tuple)
        if None in record:
            raise _UnfitError(f"has no text in column {keys[record.index(None)]!r}")
        return tuple(_text(field) for field in record if field is not None)
    assert isinstance(record, bytes)
    if len(record) > limit:
        raise _UnfitError(too_long(limit))
    if part.form != "json":
        return (_text(record),)
    return _quick_json_fields(record, keys) or _json_fields(_text(record), keys)


def _text(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        wrong = content[error.start]
        raise _UnfitError(f"is not UTF-8: byte 0x{wrong:02x} at {error.start}") from None


def _quick_json_fields(record: bytes, keys: tuple[str, ...]) -> tuple[str, ...] | None:
    """What `_json_fields` returns, in half of its time; None: that has to be asked.

    What orjson takes, Python's json takes too and makes the same strings of, unless it runs out of
    stack: so brackets are counted, in texts too and before orjson sees them (of a key that is there
    twice it shows one value only). It does not take all that json does: NaN, half a surrogate pair.
    """
    if orjson_loads is None or record.count(b"[") + record.count(b"{") > _NEVER_TOO_DEEP:
        return None
    try:
        found = orjson_loads(record)
    except ValueError:
        return None
    if not isinstance(found, dict):
        return None
    fields = tuple(field for field in map(found.get, keys) if isinstance(field, str))
    return fields if len(fields) == len(keys) else None


def _json_fields(line: str, keys: tuple[str, ...]) -> tuple[str, ...]:
    try:
        record = _parsed(line)
    except (ValueError, RecursionError) as error:
        raise _UnfitError(f"is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise _UnfitError(f"is no JSON object but {_json_type(record)}")
    for key in keys:
        if key not in record:
            raise _UnfitError(f"has no key {key!r}")
        if not isinstance(record[key], str):
            raise _UnfitError(f"has in key {key!r} {_json_type(record[key])}, not a string")
    fields = tuple(record[key] for key in keys)
    _check_unicode(fields)
    return fields


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python reads no integer of thousands of digits; no number is used here
        return json.loads(line, parse_int=float)


def _check_unicode(fields: tuple[str, ...]) -> None:
    try:
        for field in fields:
            field.encode()
    except UnicodeEncodeError:
        raise _UnfitError("holds half of a surrogate pair") from None


def _json_type(value: object) -> str:
    if isinstance(value, bool | None):
        return json.dumps(value)
    names = ((dict, "an object"), (list, "an array"), (str, "a string"))
    return next((name for kind, name in names if isinstance(value, kind)), "a number")
