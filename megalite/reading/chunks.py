"""Inputs as chunks of whole records, in order, in bounded memory.

A record is a line of JSON Lines, a row of a parquet file, or a document of a text file: the whole
file, a line, or what stands between blank lines. A chunk is about a megabyte of records; it knows
where the reading goes on behind it, so that an interrupted run continues there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megalite.errors import DataError
from megalite.reading.inputs import Input
from megalite.reading.streams import ByteStream, DamagedError

CHUNK_BYTES = 1 << 20
TEXT_DOCUMENTS = ("file", "line", "blank-line")
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, order=True)
class Bad:
    """A record that is left out.

    Attributes:
        input: number of the input.
        record: its line or row, counted from 1; 0: the file itself.
        why: the rest of a sentence.
        count: records left out for this.
    """

    input: int
    record: int
    why: str
    count: int = 1


@dataclass(frozen=True)
class Place:
    """Where reading goes on.

    Attributes:
        input: number of the input.
        offset: bytes of its (unpacked) content, or its rows, already read.
        record: the number of its next line or row.
    """

    input: int = 0
    offset: int = 0
    record: int = 1


@dataclass(frozen=True)
class Lines:
    """Whole records as they stand in the file; `first` is the number of the first line.

    `form` is "json" or "line" (a record is a line), or "blank-line" (blank lines between records).
    `at` is the content's place in the file [bytes], None if that is packed or standard input.
    """

    input: int
    first: int
    content: bytes
    form: str
    at: int | None = None


@dataclass(frozen=True)
class Rows:
    """Records as UTF-8 text: of each a field per key, None where there is no text."""

    input: int
    first: int
    content: tuple[tuple[bytes | None, ...], ...]


@dataclass(frozen=True)
class Chunk:
    """Records to encode together.

    Attributes:
        parts: in order.
        bad: records that could not even be read.
        after: where the reading goes on behind the chunk.
        read_bytes: of all input files, read so far.
    """

    parts: tuple[Lines | Rows, ...]
    bad: tuple[Bad, ...]
    after: Place
    read_bytes: int


_Step = tuple[Lines | Rows | Bad, Place, int]
"""What was read, where it goes on, and the position in the file itself."""


def chunks(
    inputs: Sequence[Input],
    keys: Sequence[str],
    text_documents: str,
    limit: int,
    start: Place,
) -> Iterator[Chunk]:
    """All records from a place on.

    Args:
        inputs: to read, in this order.
        keys: the fields wanted of each record.
        text_documents: what one document of a text file is, one of TEXT_DOCUMENTS.
        limit: longest record [bytes]; a longer one is left out and named, and never held.
        start: where to begin.

    Raises:
        DataError: a file cannot be read.
    """
    parts: list[Lines | Rows] = []
    bad: list[Bad] = []
    size = 0
    place, read_bytes = start, sum(each.size for each in inputs[: start.input])
    before = read_bytes
    for number, source in enumerate(inputs[start.input :], start.input):
        begin = start if number == start.input else Place(number)
        for what, place, position in _steps(source, begin, keys, text_documents, limit):
            read_bytes = before + position
            if isinstance(what, Bad):
                bad.append(what)
            else:
                parts.append(what)
                size += _size(what)
            if size >= CHUNK_BYTES:
                yield Chunk(tuple(parts), tuple(bad), place, read_bytes)
                parts, bad, size = [], [], 0
        before += source.size
        place = Place(number + 1)
    if parts or bad:
        yield Chunk(tuple(parts), tuple(bad), place, read_bytes)


def _size(part: Lines | Rows) -> int:
    if isinstance(part, Lines):
        return len(part.content)
    return sum(len(field or b"") + 64 for row in part.content for field in row)


def _steps(
    source: Input, start: Place, keys: Sequence[str], text_documents: str, limit: int
) -> Iterator[_Step]:
    try:
        if source.kind == "parquet":
            from megalite.reading.parquet import rows

            yield from rows(source, start, keys, limit)
        else:
            yield from _stream_steps(source, start, text_documents, limit)
    except OSError as error:
        raise DataError(f"{source.path} cannot be read: {error.strerror or error}") from None


def _stream_steps(source: Input, start: Place, text_documents: str, limit: int) -> Iterator[_Step]:
    stream = ByteStream(source)
    try:
        if source.kind == "text" and text_documents == "file":
            yield _whole(stream, start, limit), Place(start.input + 1), stream.position
            return
        form = "json" if source.kind == "json" else text_documents
        stream.skip(start.offset)
        for what, place in _records(stream, start, form, limit):
            yield what, place, stream.position
    finally:
        stream.close()


def _whole(stream: ByteStream, start: Place, limit: int) -> Rows | Bad:
    """A file that is one document."""
    try:
        content = stream.read(limit + 1)
        if len(content) <= limit:
            stream.read(1)  # a packed file may be cut behind its last byte
    except DamagedError as error:
        return Bad(start.input, 1, f"cannot be unpacked: {error}")
    if len(content) > limit:
        return Bad(
            start.input,
            1,
            f"{too_long(limit)} as one document: --text-documents line or blank-line cuts it",
        )
    return Rows(start.input, 1, ((content.removeprefix(BOM),),))


def too_long(limit: int) -> str:
    """What is wrong with a record of more bytes."""
    return f"is longer than {limit >> 20} MB (--max-document-mb)"


_ARRAY = re.compile(rb"\s*\[\s*(\{|$)")
"""How an array of records begins."""


class NoLinesError(DataError):
    """A file is JSON, but not JSON Lines."""


def _records(
    stream: ByteStream, start: Place, form: str, limit: int
) -> Iterator[tuple[Lines | Bad, Place]]:
    """Whole records, about a chunk together, and where to go on behind them."""
    place, held = start, b""
    dropping = 0  # the line at which a record begins that is too long to be held

    def behind(size: int) -> Place:
        return Place(place.input, place.offset + size, place.record + held.count(b"\n", 0, size))

    while True:
        try:
            block = stream.read(CHUNK_BYTES)
        except DamagedError as error:
            what = Bad(start.input, place.record, f"cannot be unpacked: {error}")
            yield what, Place(start.input + 1)
            return
        held += block
        if form == "json" and not place.offset and _ARRAY.match(held.removeprefix(BOM)[:64]):
            raise NoLinesError(
                f"{stream.path} is one JSON array: expected JSON Lines, an object for each record "
                f"on a line of its own, as jq -c '.[]' writes them"
            )
        if dropping:
            end = _first_end(held, form) if block else len(held)
            size = end or len(held) - 2  # what ends a record may begin with the last two bytes
            place, held = behind(size), held[size:]
            if block and not end:
                continue
            yield Bad(start.input, dropping, too_long(limit)), place
            dropping = 0
        end = _last_end(held, form) if block else len(held)
        if end:
            content = held[:end] if place.offset else held[:end].removeprefix(BOM)
            first, place, held = place.record, behind(end), held[end:]
            at = place.offset - len(content) if stream.plain else None
            yield Lines(start.input, first, content, form, at), place
        elif len(held) > limit + 4:  # line ends on both sides do not count
            leading = held[: len(held) - len(held.lstrip(b"\r\n"))]
            dropping = place.record + leading.count(b"\n")
        if not block:
            return


def _first_end(content: bytes, form: str) -> int:
    """Behind the first record, 0 if none ends."""
    if form != "blank-line":
        return content.find(b"\n") + 1
    found = re.search(rb"\n\r?\n", content)
    return found.end() if found else 0


def _last_end(content: bytes, form: str) -> int:
    """Behind the last record that ends, 0 if none does."""
    if form != "blank-line":
        return content.rfind(b"\n") + 1
    ends = (content.rfind(end) + len(end) for end in (b"\n\n", b"\n\r\n") if end in content)
    return max(ends, default=0)
