"""A record that cannot be used is named, with its line and what is wrong, and left out; all others
are read."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from readings import LIMIT, all_chunks, encoding, packed, read, texts_of, tiny_pieces

from megalite.errors import DataError
from megalite.preprocessing.encode import encode_chunk
from megalite.preprocessing.run import prepare
from megalite.preprocessing.settings import Settings
from megalite.reading import chunks as chunks_module
from megalite.reading import records
from megalite.reading.inputs import find_inputs
from megalite.tokenizer.settings import TokenizerSettings


@pytest.fixture
def _tiny_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_pieces(monkeypatch)


BAD_LINES = {
    b'{"text": "caf\xe9"}': "is not UTF-8: byte 0xe9 at 13",
    b'{"text": "a"': "is not JSON: Expecting ',' delimiter: line 1 column 13 (char 12)",
    b"text": "is not JSON: Expecting value: line 1 column 1 (char 0)",
    b'{"text": "a"} {"text": "b"}': "is not JSON: Extra data: line 1 column 15 (char 14)",
    b"[" * 100_000: "is not JSON: maximum recursion depth exceeded",
    b'["text"]': "is no JSON object but an array",
    b'"text"': "is no JSON object but a string",
    b"12": "is no JSON object but a number",
    b"null": "is no JSON object but null",
    b'{"body": "a"}': "has no key 'text'",
    b'{"text": null}': "has in key 'text' null, not a string",
    b'{"text": ["a"]}': "has in key 'text' an array, not a string",
    b'{"text": 3.5}': "has in key 'text' a number, not a string",
    b'{"text": true}': "has in key 'text' true, not a string",
    b'{"text": "\\ud83d"}': "holds half of a surrogate pair",
    b'{"text": "' + b"x" * LIMIT + b'"}': "is longer than 1 MB (--max-document-mb)",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:20].decode("latin-1"))
def test_a_bad_line_is_named_and_left_out(tmp_path: Path, line: bytes) -> None:
    good = b'{"text": "good"}\n'
    (tmp_path / "a.jsonl").write_bytes(good * 2 + b"\n" + line + b"\n" + good)
    found, bad = read(tmp_path / "a.jsonl")
    assert found == [("good",)] * 3
    ((name, record, why),) = bad
    assert (name, record) == ("a.jsonl", 4)
    assert why.startswith(BAD_LINES[line]), why


def test_a_number_of_any_length_is_json(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "n": ' + "9" * 5000 + "}\n")
    assert texts_of(tmp_path / "a.jsonl") == ["a"]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz"])
def test_an_array_of_records_is_refused(tmp_path: Path, name: str, indent: int | None) -> None:
    content = json.dumps([{"text": "a"}, {"text": "b"}], indent=indent).encode()
    path = packed(tmp_path / name, content, random.Random(0))
    with pytest.raises(DataError, match="is one JSON array: expected JSON Lines"):
        read(path)
    job = prepare(Settings((str(path),), f"{tmp_path}/o", workers=1))
    with pytest.raises(DataError, match="is one JSON array: expected JSON Lines") as error:
        job.run(lambda progress: None)
    assert "--resume" not in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


def test_a_text_that_has_no_tokens_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("5 6\n7 eight\n9\n")
    (chunk,) = all_chunks(tmp_path / "a.txt", documents="line")
    numbers = TokenizerSettings(tokenizer_type="NullTokenizer")
    result = encode_chunk(replace(encoding(), tokenizer=numbers, vocab_size=10), chunk)
    assert result.datasets[0].lengths.tolist() == [2, 1]
    assert [(bad.record, bad.why) for bad in result.bad] == [
        (2, "has no tokens: NullTokenizer: 'eight' is no token id from 0 to 9"),
    ]


def test_a_record_is_good_only_with_all_its_keys(tmp_path: Path) -> None:
    lines = [{"a": "1", "b": "2"}, {"a": "3"}, {"a": "", "b": "4"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, bad = read(tmp_path / "a.jsonl", keys=("a", "b"))
    assert found == [("1", "2"), ("", "4")]
    assert bad == [("a.jsonl", 2, "has no key 'b'")]


@pytest.mark.parametrize("size", [999, 1000, 1001, 1004, 1005, 1006, 3000, 10_000])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
@pytest.mark.parametrize("block", [1, 64, 999, 1 << 20])
def test_the_limit_is_the_same_wherever_blocks_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, end: bytes, block: int
) -> None:
    monkeypatch.setattr(chunks_module, "CHUNK_BYTES", block)
    line = b'{"text": "' + b"x" * (size - 12) + b'"}'
    first = b'{"text": "a"}\n\n'
    last = b'{"text": "b"}' if end else b""
    (tmp_path / "a.jsonl").write_bytes(first + line + end + last)
    found, bad = read(tmp_path / "a.jsonl", limit=1000)
    lengths = [len(text) for (text,) in found]
    around = ([1], [1] if end else [])
    if size <= 1000:
        assert (lengths, bad) == ([*around[0], size - 12, *around[1]], [])
    else:
        assert lengths == [*around[0], *around[1]]
        assert bad == [("a.jsonl", 3, "is longer than 0 MB (--max-document-mb)")]


@pytest.mark.usefixtures("_tiny_pieces")
@pytest.mark.parametrize("first", range(1, 8))
def test_a_paragraph_that_is_too_long(tmp_path: Path, first: int) -> None:
    content = "a" * first + "\n\n\n" + "long\nline\n" * 30 + "\nb\nc\n\n" + "d" * 101
    (tmp_path / "a.txt").write_text(content)
    found, bad = read(tmp_path / "a.txt", documents="blank-line", limit=100)
    assert found == [("a" * first,), ("b\nc",)]
    assert [(name, record) for name, record, _ in bad] == [("a.txt", 4), ("a.txt", 68)]


def test_a_text_file_that_is_too_long_says_what_helps(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\n" * 51)
    ((_, _, why),) = read(tmp_path / "a.txt", limit=100)[1]
    assert why == (
        "is longer than 0 MB (--max-document-mb) as one document: --text-documents line or "
        "blank-line cuts it"
    )


def test_parquet_rows_that_cannot_be_used(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", None, "x" * 200, "b"]}), path)
    assert read(path, limit=100) == (
        [("a",), ("b",)],
        [
            ("a.parquet", 2, "has no text in column 'text'"),
            ("a.parquet", 3, "is longer than 0 MB (--max-document-mb)"),
        ],
    )
    binary = pyarrow.table({"text": pyarrow.array([b"a", b"\xff"], pyarrow.binary())})
    parquet.write_table(binary, path)
    assert read(path) == ([("a",)], [("a.parquet", 2, "is not UTF-8: byte 0xff at 0")])
    parquet.write_table(pyarrow.table({"text": [1, 2], "body": ["a", "b"]}), path)
    assert read(path)[1] == [("a.parquet", 1, "has in column 'text' int64, not text")]
    (chunk,) = all_chunks(path)
    assert encode_chunk(encoding(), chunk).bad_count == 2, "both rows"
    inputs = find_inputs([str(path)])[0]
    (told,) = records.sentences(chunk.bad, inputs)
    assert told == f"{path}: each of its 2 rows has in column 'text' int64, not text"
    assert read(path, keys=("story",))[1] == [
        ("a.parquet", 1, "has no column 'story', only text, body")
    ]
    path.write_bytes(path.read_bytes()[:-4])
    (chunk,) = all_chunks(path)
    (told,) = records.sentences(chunk.bad, inputs)
    assert told.startswith(f"{path} cannot be read: Parquet magic bytes not found")


def test_five_records_are_described(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("x\n" * 20)
    (chunk,) = all_chunks(tmp_path / "a.jsonl")
    result = encode_chunk(encoding(), chunk)
    assert [bad.record for bad in result.bad] == [1, 2, 3, 4, 5]
    assert records.SHOWN_BAD == 5
    assert result.bad_count == 20
