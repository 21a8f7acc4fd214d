"""What is read is the inputs' records, in order, whatever their packing and wherever reading starts
anew; what cannot be read is named. Compared with a plain reading of whole files."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megalite.errors import DataError
from megalite.preprocessing.encode import Encoding, encode_chunk
from megalite.preprocessing.run import prepare
from megalite.preprocessing.settings import Settings
from megalite.preprocessing.workers import encode_in_order
from megalite.reading import chunks as chunks_module
from megalite.reading import records, streams
from megalite.reading.chunks import Chunk, Lines, Place, chunks
from megalite.reading.inputs import find_inputs, natural_key
from megalite.tokenizer.settings import TokenizerSettings

LIMIT = 1 << 20
Bad = tuple[str, int, str]


def encoding(*keys: str, limit: int = LIMIT) -> Encoding:
    return Encoding(TokenizerSettings(), 0, keys or ("text",), append_eod=False, limit=limit)


def all_chunks(
    *given: Path | str,
    keys: tuple[str, ...] = ("text",),
    documents: str = "file",
    limit: int = LIMIT,
    start: Place | None = None,
) -> list[Chunk]:
    inputs, problems = find_inputs([str(each) for each in given])
    assert not problems
    return list(chunks(inputs, keys, documents, limit, start or Place()))


def read(
    *given: Path | str,
    keys: tuple[str, ...] = ("text",),
    documents: str = "file",
    limit: int = LIMIT,
    start: Place | None = None,
) -> tuple[list[tuple[str, ...]], list[Bad]]:
    """Texts by key of every record, and what was left out: (file, record, why)."""
    names = [Path(each.path).name for each in find_inputs([str(each) for each in given])[0]]
    texts: list[tuple[str, ...]] = []
    bad: list[Bad] = []
    for chunk in all_chunks(*given, keys=keys, documents=documents, limit=limit, start=start):
        result = encode_chunk(encoding(*keys, limit=limit), chunk)
        columns = []
        for each in result.datasets:
            ends = iter(each.lengths.cumsum())
            start_, column = 0, []
            for has_tokens in each.sequences:
                stop = int(next(ends)) if has_tokens else start_
                column.append(bytes(each.tokens[start_:stop].astype("u1")).decode())
                start_ = stop
            columns.append(column)
        texts += zip(*columns, strict=True)
        bad += [(names[b.input], b.record, b.why) for b in result.bad]
    return texts, bad


def texts_of(*given: Path | str, **options: object) -> list[str]:
    found, bad = read(*given, **options)  # type: ignore[arg-type]
    assert not bad
    return [text for (text,) in found]


@pytest.fixture
def _tiny_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and blocks of 7 bytes: every boundary falls everywhere."""
    monkeypatch.setattr(chunks_module, "CHUNK_BYTES", 7)
    monkeypatch.setattr(streams, "_FEED_BYTES", 3)


ALPHABET = ["a", "b", " ", "é", "日", "🎉", "\\", '"', "\t", "\u2028", "\x85", "\x1c", "\r"]


def random_text(draw: random.Random, longest: int = 30) -> str:
    return "".join(draw.choices(ALPHABET, k=draw.randrange(longest)))


def json_lines(draw: random.Random, texts: list[str]) -> bytes:
    """Lines as different programs write them."""
    lines = []
    for text in texts:
        line = json.dumps({"id": 1, "text": text}, ensure_ascii=draw.random() < 0.5)
        lines.append(line.encode() + draw.choice([b"\n", b"\r\n", b"\n\n", b"\n  \n"]))
    content = b"".join(lines)
    return content.rstrip(b"\r\n ") if draw.random() < 0.5 else content


# Every way to read gives the same


def packed(path: Path, content: bytes, draw: random.Random) -> Path:
    """The content in a file, packed as the name says, in one or several members."""
    if path.suffix == ".gz":
        pack: Callable[[bytes], bytes] = gzip.compress
    elif path.suffix == ".zst":
        pack = pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress
    else:
        path.write_bytes(content)
        return path
    cuts = sorted(draw.randrange(len(content) + 1) for _ in range(draw.randrange(3)))
    members = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    path.write_bytes(b"".join(map(pack, members)))
    return path


@pytest.mark.usefixtures("_tiny_pieces")
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".json.zst"])
@pytest.mark.parametrize("seed", range(8))
def test_json_lines(tmp_path: Path, seed: int, suffix: str) -> None:
    draw = random.Random(seed)
    texts = [random_text(draw) for _ in range(draw.choice([1, 2, 20]))]
    path = packed(tmp_path / f"a{suffix}", json_lines(draw, texts), draw)
    assert texts_of(path) == texts


@pytest.mark.usefixtures("_tiny_pieces")
@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.zst"])
@pytest.mark.parametrize("seed", range(8))
def test_text_files(tmp_path: Path, seed: int, suffix: str) -> None:
    draw = random.Random(seed)
    lines = [draw.choice(["", "", "a b", "日本 é", "c" * 20]) for _ in range(12)]
    end = draw.choice(["\n", "\r\n"])
    content = end.join(lines) + draw.choice(["", end, end * 3])
    path = packed(tmp_path / f"a{suffix}", content.encode(), draw)
    assert texts_of(path) == [content]
    assert texts_of(path, documents="line") == [line for line in lines if line]
    paragraphs = re.split(r"\n\n+", content.replace("\r\n", "\n").strip("\n"))
    found = [text.replace("\r\n", "\n") for text in texts_of(path, documents="blank-line")]
    assert found == [each for each in paragraphs if each]


@pytest.mark.parametrize("rows_of_a_group", [1, 3, 1000])
def test_parquet(tmp_path: Path, rows_of_a_group: int) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    draw = random.Random(rows_of_a_group)
    texts = [random_text(draw) for _ in range(50)]
    columns = {"id": list(range(50)), "text": texts, "title": texts[::-1]}
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table(columns), path, row_group_size=rows_of_a_group)
    assert texts_of(path) == texts
    assert read(path, keys=("title", "text"))[0] == list(zip(texts[::-1], texts, strict=True))
    coded = pyarrow.table({"text": pyarrow.array(texts).dictionary_encode()})
    parquet.write_table(coded, path)
    assert texts_of(path) == texts


def test_parquet_rows_that_cannot_be_used(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", None, "x" * 200, "b"]}), path)
    assert read(path, limit=100) == (
        [("a",), ("b",)],
        [
            ("a.parquet", 2, "has no text in column 'text'"),
            ("a.parquet", 3, "longer than 0 MB (--max-document-mb)"),
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


@pytest.mark.usefixtures("_tiny_pieces")
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.parquet"])
@pytest.mark.parametrize("documents", ["file", "line", "blank-line"])
def test_reading_goes_on_behind_every_chunk(tmp_path: Path, name: str, documents: str) -> None:
    draw = random.Random(3)
    texts = [random_text(draw) for _ in range(15)]
    for i in range(2):
        path = tmp_path / f"{i}{name}"
        if path.suffix == ".parquet":
            pyarrow = pytest.importorskip("pyarrow")
            import pyarrow.parquet as parquet

            parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=4)
        else:
            packed(path, json_lines(draw, texts), draw)
    whole = read(tmp_path, documents=documents)
    assert not whole[1]
    places = [chunk.after for chunk in all_chunks(tmp_path, documents=documents)]
    assert len(places) > 1
    for i, place in enumerate(places):
        rest = read(tmp_path, documents=documents, start=place)
        assert rest[0] == whole[0][len(whole[0]) - len(rest[0]) :]
        assert len(rest[0]) < len(whole[0]) - i or not i, "each chunk has records"


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(mark + b'{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "b.txt").write_bytes(mark + b"c")
    assert texts_of(tmp_path) == ["a", "b", "c"]
    assert texts_of(tmp_path / "b.txt", documents="line") == ["c"]


# What cannot be used

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
    b'{"text": "' + b"x" * LIMIT + b'"}': "longer than 1 MB (--max-document-mb)",
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
        assert bad == [("a.jsonl", 3, "longer than 0 MB (--max-document-mb)")]


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
        "longer than 0 MB (--max-document-mb) as one document: --text-documents line or "
        "blank-line cuts it"
    )


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("seed", range(6))
def test_a_packed_file_that_is_cut_short(tmp_path: Path, suffix: str, seed: int) -> None:
    """All whole lines before the cut are read; the cut is named with the line it is in."""
    draw = random.Random(seed)
    texts = [random_text(draw, 300) for _ in range(300)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path = packed(tmp_path / f"a.jsonl.{suffix}", lines, random.Random(99))
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(20, len(content))])
    found, bad = read(path)
    assert [text for (text,) in found] == texts[: len(found)]
    why = "cannot be unpacked: it ends in the middle: the file was cut short"
    assert bad == [(path.name, len(found) + 1, why)]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_packed_file_that_is_damaged(tmp_path: Path, suffix: str) -> None:
    draw = random.Random(1)
    lines = "".join(json.dumps({"text": random_text(draw)}) + "\n" for _ in range(300)).encode()
    path = packed(tmp_path / f"a.jsonl.{suffix}", lines, random.Random(99))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    path.write_bytes(content)
    (tmp_path / "b.jsonl").write_text('{"text": "next"}\n')
    found, bad = read(path, tmp_path / "b.jsonl")
    assert found[-1] == ("next",), "the next file is read"
    assert bad
    assert bad[-1][2].startswith("cannot be unpacked: ")
    path.write_bytes(b"no such packing")
    assert read(path)[1][0][:2] == (path.name, 1)


def test_a_packed_file_may_be_padded(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text") + b"\0" * 5000)
    assert texts_of(tmp_path / "a.txt.gz") == ["text"]


def test_a_file_made_to_explode_is_read_in_pieces(tmp_path: Path) -> None:
    """64 MB of one line in 64 KB: never more than a few pieces are held."""
    import tracemalloc

    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "' + b"x" * (64 << 20) + b'"}\n{"text": "a"}'))
    tracemalloc.start()
    found = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == ([("a",)], [("a.jsonl.gz", 1, "longer than 1 MB (--max-document-mb)")])
    assert peak < 12 << 20


# Which files, in which order


def test_order_of_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["p10.jsonl", "p2.jsonl", "p1.txt.gz", "sub/p3.json", "sub/.hidden.txt", "note.md"]
    (tmp_path / "sub").mkdir()
    for name in [*names, "p[1].jsonl"]:
        Path(name).touch()

    def found(*given: str) -> list[str]:
        inputs, problems = find_inputs(given)
        assert not problems
        return [each.path for each in inputs]

    assert found(".") == [
        "./p1.txt.gz",
        "./p2.jsonl",
        "./p10.jsonl",
        "./p[1].jsonl",
        "./sub/p3.json",
    ]
    assert found("p*.jsonl", "sub") == ["p2.jsonl", "p10.jsonl", "p[1].jsonl", "sub/p3.json"]
    assert found("p10.jsonl", "p2.jsonl") == ["p10.jsonl", "p2.jsonl"]
    assert found("p[1].jsonl") == ["p[1].jsonl"], "a name goes before a pattern"
    assert found("**/p3.json", "-") == ["sub/p3.json", "-"]


def test_natural_order() -> None:
    names = [
        "9",
        "10",
        "a1b2",
        "a1b10",
        "part",
        "part_02",
        "part_2",
        "part_2b",
        "part_9",
        "part_10",
    ]
    for seed in range(20):
        shuffled = random.Random(seed).sample(names, len(names))
        assert sorted(shuffled, key=natural_key) == names


def missing(*given: str) -> Iterator[str]:
    yield from find_inputs(given)[1]


def test_inputs_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").touch()
    Path("a.md").touch()
    Path("link.txt").symlink_to("nowhere")
    os.mkdir("empty")
    assert list(
        missing("b.jsonl", "*.gz", "empty", "a.md", "link.txt", "a.jsonl", "./a.jsonl")
    ) == [
        "--input b.jsonl: there is no such file; beside it: a.jsonl, link.txt",
        "--input *.gz: matches no file; beside it: a.jsonl, link.txt",
        "--input empty: the folder holds no .jsonl, .json, .txt or .parquet file (the first three "
        "also .gz or .zst)",
        "--input a.md: a.md is no .jsonl, .json, .txt or .parquet file (the first three also .gz "
        "or .zst)",
        "--input link.txt: link.txt: No such file or directory",
        "--input: ./a.jsonl is named twice",
    ]


def test_packages_that_are_missing_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt.zst").touch()
    (tmp_path / "a.parquet").touch()
    monkeypatch.setattr("megalite.reading.inputs.find_spec", lambda name: None)
    assert sorted(missing(str(tmp_path))) == [
        "--input: parquet files need the package pyarrow: pip install 'megalite[data]'",
        "--input: zstd files need the package zstandard: pip install 'megalite[data]'",
    ]


def test_five_records_are_described(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("x\n" * 20)
    (chunk,) = all_chunks(tmp_path / "a.jsonl")
    result = encode_chunk(encoding(), chunk)
    assert [bad.record for bad in result.bad] == [1, 2, 3, 4, 5]
    assert records.SHOWN_BAD == 5
    assert result.bad_count == 20


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_is_cut_or_goes_while_it_is_read(tmp_path: Path, packed: bool) -> None:
    """Workers read plain files again; what is packed is handed to them."""
    content = b'{"text": "a"}\n' * 100
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    for damage in (lambda: os.truncate(path, 10), lambda: os.unlink(path)):
        path.write_bytes(gzip.compress(content) if packed else content)
        inputs, _ = find_inputs([str(path)])
        found = list(chunks(inputs, ("text",), "file", LIMIT, Place()))
        damage()
        if packed:
            ((_, result),) = encode_in_order(encoding(), inputs, found, 1)
            assert len(result.datasets[0].lengths) == 100
            continue
        with pytest.raises(DataError) as raised:
            list(encode_in_order(encoding(), inputs, found, 1))
        (why,) = raised.value.violations
        assert why.startswith(f"{path} cannot be read: ")
        assert why.endswith("; when it can, the same command with --resume goes on")
        assert "shorter" in why or "No such file" in why


def test_lines_say_where_they_stand(tmp_path: Path) -> None:
    """With a byte order mark, long records that are passed over, and from the middle on."""
    draw = random.Random(3)
    lines = [b'"' + b"x" * draw.choice([10, 300_000, 300_000, 2_500_000]) + b'"' for _ in range(40)]
    content = b"\xef\xbb\xbf" + b"\n".join(lines)
    (tmp_path / "a.jsonl").write_bytes(content)
    found = all_chunks(tmp_path / "a.jsonl")
    found += all_chunks(tmp_path / "a.jsonl", start=found[0].after)
    assert len(found) > 4
    for part in (part for chunk in found for part in chunk.parts):
        assert isinstance(part, Lines)
        assert part.at is not None
        assert content[part.at : part.at + len(part.content)] == part.content
