"""Rows of parquet files, with the optional package pyarrow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow
import pyarrow.parquet

from megalite.reading.chunks import CHUNK_BYTES, Bad, Place, Rows, too_long
from megalite.reading.inputs import Input

Row = tuple[bytes | None, ...]


def rows(
    source: Input, start: Place, keys: Sequence[str], limit: int
) -> Iterator[tuple[Rows | Bad, Place, int]]:
    """Rows from a place on: see `reading`.

    A file is read page by page; a page has to fit into the memory, as whoever wrote it held it too.
    """
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(
            source.path, pre_buffer=False, buffer_size=1 << 20
        ) as file:
            row = start.record
            why = _unfit(file.schema_arrow, keys)
            if why:
                all_rows = Bad(start.input, 1, why, file.metadata.num_rows)
                yield all_rows, Place(start.input + 1), source.size
                return
            for what, after, position in _rows(source, file, start, keys, limit):
                row = after.record
                yield what, after, position
    except pyarrow.ArrowException as error:
        rest = Bad(start.input, row, f"cannot be read: {error}")
        yield rest, Place(start.input + 1), source.size


def _unfit(schema: pyarrow.Schema, keys: Sequence[str]) -> str:
    """Why no row of such a file has a text for each key; "" if they may."""
    for key in keys:
        if key not in schema.names:
            return f"has no column {key!r}, only {', '.join(schema.names)}"
        found = schema.field(key).type
        kinds = pyarrow.types
        values = found.value_type if kinds.is_dictionary(found) else found
        texts = (kinds.is_string, kinds.is_large_string, kinds.is_binary, kinds.is_large_binary)
        if not any(is_text(values) for is_text in texts):
            return f"has in column {key!r} {found}, not text"
    return ""


def _rows(
    source: Input,
    file: pyarrow.parquet.ParquetFile,
    start: Place,
    keys: Sequence[str],
    limit: int,
) -> Iterator[tuple[Rows | Bad, Place, int]]:
    total = max(1, file.metadata.num_rows)
    done = 0
    for group in range(file.num_row_groups):
        described = file.metadata.row_group(group)
        if done + described.num_rows <= start.offset:
            done += described.num_rows
            continue
        row_bytes = described.total_byte_size // max(1, described.num_rows) + 1
        batches = file.iter_batches(
            batch_size=max(1, min(1 << 14, CHUNK_BYTES // row_bytes)),
            row_groups=[group],
            columns=list(keys),
            use_threads=False,
        )
        for batch in batches:
            fresh = batch.slice(max(0, min(start.offset - done, len(batch))))
            first = done + len(batch) - len(fresh) + 1
            done += len(batch)
            for what, last in _parts(start.input, fresh, first, keys, limit):
                yield what, Place(start.input, last, last + 1), source.size * last // total


def _parts(
    number: int, batch: pyarrow.RecordBatch, first: int, keys: Sequence[str], limit: int
) -> Iterator[tuple[Rows | Bad, int]]:
    """The rows of a batch, without those that are too long, and the number of the last of them."""
    columns = [batch.column(key).cast(pyarrow.large_binary()) for key in keys]
    held: list[Row] = []
    for i in range(len(batch)):
        row = tuple(column[i].as_py() for column in columns)
        if any(len(field or b"") > limit for field in row):
            if held:
                yield Rows(number, first + i - len(held), tuple(held)), first + i - 1
            held = []
            yield Bad(number, first + i, too_long(limit)), first + i
        else:
            held.append(row)
    if held:
        yield Rows(number, first + len(batch) - len(held), tuple(held)), first + len(batch) - 1
