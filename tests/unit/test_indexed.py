"""Indexed datasets are Megatron-LM's files to the byte, damage of every kind is named, and files
appear only when they are complete."""

from __future__ import annotations

import random
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megalite.data.indexed_format import token_dtype
from megalite.data.indexed_reader import IndexedReader
from megalite.data.indexed_writer import IndexedWriter
from megalite.errors import DataError

DOCUMENTS = [[[5, 6, 7, 2]], [], [[8, 9, 2]]]
GOLDEN_BIN = "0500 0600 0700 0200 0800 0900 0200"
GOLDEN_IDX = """
4d4d4944494458 0000  0100000000000000  08  0200000000000000  0400000000000000
04000000 03000000
0000000000000000 0800000000000000
0000000000000000 0100000000000000 0100000000000000 0200000000000000
"""


def write(prefix: Path, documents: list[list[list[int]]], dtype: str = "<u2") -> Path:
    """Documents of sequences of tokens."""
    writer = IndexedWriter(prefix, np.dtype(dtype))
    for document in documents:
        for sequence in document:
            writer.add_sequence(np.array(sequence, np.int64))
        writer.end_document()
    writer.close()
    return prefix


def parts(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def read_with_struct(prefix: Path) -> list[list[list[int]]]:
    """Documents of sequences, by the format's description alone."""
    tokens, index = parts(prefix)
    magic, version, code, sequences, documents = struct.unpack_from("<9sQBQQ", index)
    assert (magic, version) == (b"MMIDIDX\0\0", 1)
    letter = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}[code]
    lengths = struct.unpack_from(f"<{sequences}i", index, 34)
    pointers = struct.unpack_from(f"<{sequences}q", index, 34 + 4 * sequences)
    ends = struct.unpack_from(f"<{documents}q", index, 34 + 12 * sequences)
    assert len(index) == 34 + 12 * sequences + 8 * documents
    found = [
        list(struct.unpack_from(f"<{length}{letter}", tokens, pointer))
        for length, pointer in zip(lengths, pointers, strict=True)
    ]
    return [found[a:b] for a, b in pairwise(ends)]


def read_with_reader(prefix: Path) -> list[list[list[int]]]:
    reader = IndexedReader(prefix)
    ends = np.cumsum(reader.lengths)
    found = [
        reader.tokens[end - length : end].tolist()
        for end, length in zip(ends, reader.lengths, strict=True)
    ]
    return [found[a:b] for a, b in pairwise(reader.documents)]


# The format


def test_golden_bytes(tmp_path: Path) -> None:
    tokens, index = parts(write(tmp_path / "golden", DOCUMENTS))
    assert tokens.hex() == GOLDEN_BIN.replace(" ", "")
    assert index.hex() == "".join(GOLDEN_IDX.split())
    assert len(index) == 90


def test_golden_bytes_are_read(tmp_path: Path) -> None:
    (tmp_path / "golden.bin").write_bytes(bytes.fromhex(GOLDEN_BIN))
    (tmp_path / "golden.idx").write_bytes(bytes.fromhex(GOLDEN_IDX))
    reader = IndexedReader(tmp_path / "golden")
    assert reader.tokens.tolist() == [5, 6, 7, 2, 8, 9, 2]
    assert reader.tokens.dtype == np.uint16
    assert reader.lengths.tolist() == [4, 3]
    assert reader.documents.tolist() == [0, 1, 1, 2]
    assert read_with_reader(tmp_path / "golden") == DOCUMENTS


@pytest.mark.parametrize(
    ("dtype", "code"),
    [("<u1", 1), ("<i1", 2), ("<i2", 3), ("<i4", 4), ("<i8", 5), ("<u2", 8)],
)
def test_round_trip_of_every_dtype(tmp_path: Path, dtype: str, code: int) -> None:
    draw = random.Random(code)
    largest = int(np.iinfo(dtype).max)
    documents = [
        [
            [draw.randint(0, largest) for _ in range(draw.choice([0, 1, 2, 50]))]
            for _ in range(draw.choice([0, 1, 2, 3]))
        ]
        for _ in range(40)
    ]
    prefix = write(tmp_path / "a.b", documents, dtype)
    assert parts(prefix)[1][17] == code
    assert read_with_struct(prefix) == documents
    assert read_with_reader(prefix) == documents
    assert IndexedReader(prefix).tokens.dtype == np.dtype(dtype)


@pytest.mark.parametrize("documents", [[], [[]], [[], []], [[[]]], [[[], []], []]])
def test_datasets_without_a_token(tmp_path: Path, documents: list[list[list[int]]]) -> None:
    prefix = write(tmp_path / "none", documents)
    assert read_with_struct(prefix) == documents == read_with_reader(prefix)
    assert len(IndexedReader(prefix).tokens) == 0


def test_sequences_of_a_document_that_was_not_ended_are_not_written(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "a", np.dtype("<u2"))
    writer.add_sequence(np.array([1]))
    with pytest.raises(AssertionError, match="after the last end_document"):
        writer.close()
    writer.discard()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", ["<u1", ">u2", "<i4", ">i8", "<u8"])
def test_any_integer_dtype_may_be_added(tmp_path: Path, given: str) -> None:
    writer = IndexedWriter(tmp_path / "a", np.dtype("<u2"))
    writer.add_sequence(np.arange(20, dtype=given)[::-3])  # not contiguous
    writer.end_document()
    writer.close()
    assert read_with_struct(tmp_path / "a") == [[list(range(19, -1, -3))]]


@pytest.mark.parametrize("token", [65536, 70000, -1])
def test_a_token_that_the_dtype_cannot_hold_is_not_changed_in_silence(
    tmp_path: Path, token: int
) -> None:
    writer = IndexedWriter(tmp_path / "a", np.dtype("<u2"))
    try:
        with pytest.raises((DataError, ValueError, OverflowError)):
            writer.add_sequence(np.array([1, token], np.int64))
    finally:
        writer.discard()


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(257, "<u2"), (65499, "<u2"), (65500, "<i4"), (65536, "<i4"), (128256, "<i4")],
)
def test_token_dtype(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(dtype)


def test_the_reader_maps_and_does_not_write(tmp_path: Path) -> None:
    reader = IndexedReader(write(tmp_path / "a", DOCUMENTS))
    assert isinstance(reader.tokens, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        reader.tokens[0] = 1


# Damage


def golden(version: int = 1, code: int = 8, sequences: int = 2, documents: int = 4) -> bytes:
    index = bytes.fromhex(GOLDEN_IDX)
    return index[:9] + struct.pack("<QBQQ", version, code, sequences, documents) + index[34:]


def patched(offset: int, fmt: str, value: int) -> bytes:
    index = bytearray(bytes.fromhex(GOLDEN_IDX))
    struct.pack_into(fmt, index, offset, value)
    return bytes(index)


GOOD = bytes.fromhex(GOLDEN_IDX)
TOKENS = bytes.fromhex(GOLDEN_BIN)
IDX_DAMAGE: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["not a Megatron index", "b''"]),
    "other magic": (b"TNTIDX\0\0" + GOOD[8:], ["not a Megatron index", "TNTIDX"]),
    "one wrong byte of magic": (b"MMIDIDX\0\1" + GOOD[9:], ["not a Megatron index", r"\x01"]),
    "magic alone": (GOOD[:9], ["34 bytes", "found 9"]),
    "header cut": (GOOD[:33], ["34 bytes", "found 33"]),
    "version 2": (golden(version=2), ["version 1 expected", "found 2"]),
    "version 2^56": (golden(version=1 << 56), ["version 1 expected", f"found {1 << 56}"]),
    **{
        f"dtype code {code}": (golden(code=code), [f"dtype code {code}", "(1, 2, 3, 4, 5, 8)"])
        for code in (0, 6, 7, 9, 255)
    },
    "cut by a byte": (GOOD[:-1], ["90 bytes expected", "found 89"]),
    "header alone": (GOOD[:34], ["90 bytes expected", "found 34"]),
    "a byte more": (GOOD + b"\0", ["90 bytes expected", "found 91"]),
    "more sequences": (golden(sequences=3), ["102 bytes expected", "3 sequences", "found 90"]),
    "more documents": (golden(documents=5), ["98 bytes expected", "array of 5", "found 90"]),
    "2^60 sequences": (golden(sequences=1 << 60), [f"{1 << 60} sequences", "found 90"]),
    "no document array": (
        GOOD[:9] + struct.pack("<QBQQ", 1, 8, 2, 0) + GOOD[34:58],
        ["document array must run from 0 to 2", "found [] to []"],
    ),
    "nothing at all": (
        GOOD[:9] + struct.pack("<QBQQ", 1, 8, 0, 0),
        ["document array must run from 0 to 0", "found [] to []"],
    ),
    "negative length": (patched(38, "<i", -3), ["sequence 1", "negative length"]),
    "first pointer": (patched(42, "<q", 2), ["sequence 0", "byte 0 of golden.bin", "says 2"]),
    "second pointer": (patched(50, "<q", 7), ["sequence 1", "byte 8 of golden.bin", "says 7"]),
    "negative pointer": (patched(50, "<q", -8), ["sequence 1", "byte 8", "says -8"]),
    "documents from 1": (patched(58, "<q", 1), ["from 0 to 2", "found [1] to [2]"]),
    "documents end early": (patched(82, "<q", 1), ["from 0 to 2", "found [0] to [1]"]),
    "documents end late": (patched(82, "<q", 3), ["from 0 to 2", "found [0] to [3]"]),
    "documents fall": (patched(66, "<q", 2), ["must not fall"]),
    "negative document": (patched(74, "<q", -1), ["must not fall"]),
}
BIN_DAMAGE = {
    "cut by a token": (TOKENS[:-2], ["14 bytes expected", "it has 12"]),
    "cut by a byte": (TOKENS[:-1], ["14 bytes expected", "it has 13"]),
    "a token more": (TOKENS + b"\0\0", ["14 bytes expected", "it has 16"]),
    "empty": (b"", ["14 bytes expected", "it has 0"]),
}


def refused(prefix: Path, tokens: bytes, index: bytes) -> str:
    Path(f"{prefix}.bin").write_bytes(tokens)
    Path(f"{prefix}.idx").write_bytes(index)
    with pytest.raises(DataError) as caught:
        IndexedReader(prefix)
    (sentence,) = caught.value.violations
    return sentence


@pytest.mark.parametrize("damage", IDX_DAMAGE)
def test_a_damaged_index_is_named(tmp_path: Path, damage: str) -> None:
    index, found = IDX_DAMAGE[damage]
    sentence = refused(tmp_path / "golden", TOKENS, index)
    assert sentence.startswith(f"{tmp_path}/golden.idx: ")
    assert [part for part in found if part not in sentence] == [], sentence


@pytest.mark.parametrize("damage", BIN_DAMAGE)
def test_a_bin_of_another_size_is_named(tmp_path: Path, damage: str) -> None:
    tokens, found = BIN_DAMAGE[damage]
    sentence = refused(tmp_path / "golden", tokens, GOOD)
    assert sentence.startswith(f"{tmp_path}/golden.bin: ")
    assert "golden.idx" in sentence
    assert [part for part in found if part not in sentence] == [], sentence


def test_lengths_that_add_up_to_another_size_are_noticed(tmp_path: Path) -> None:
    sentence = refused(tmp_path / "golden", TOKENS, patched(38, "<i", 4))
    assert "16 bytes expected by golden.idx" in sentence
    assert "it has 14" in sentence


@pytest.mark.parametrize("missing", ["bin", "idx"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    prefix = write(tmp_path / "a", DOCUMENTS)
    Path(f"{prefix}.{missing}").unlink()
    with pytest.raises(DataError, match=f"/a.{missing}: No such file"):
        IndexedReader(prefix)


# Completeness


def test_files_appear_only_at_close(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "a", np.dtype("<u2"))
    writer.add_sequence(np.arange(100_000) % 60_000)
    writer.end_document()
    assert not {"a.bin", "a.idx"} & {path.name for path in tmp_path.iterdir()}
    writer.close()
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin", "a.idx"}
    writer.discard()
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin", "a.idx"}, "they are kept"


def test_discard_leaves_nothing_and_what_was_there_before(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS)
    before = parts(tmp_path / "a")
    for prefix in ("a", "b"):
        writer = IndexedWriter(tmp_path / prefix, np.dtype("<u2"))
        writer.add_sequence(np.arange(100_000) % 60_000)
        writer.discard()
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin", "a.idx"}
    assert parts(tmp_path / "a") == before


def test_an_old_dataset_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "a", [[[1] * 1000]])
    write(tmp_path / "a", DOCUMENTS)
    assert read_with_reader(tmp_path / "a") == DOCUMENTS
