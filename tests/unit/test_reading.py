"""What is read is the inputs' records, in order, whatever their packing and wherever reading starts
anew. Compared with a plain reading of whole files."""

from __future__ import annotations

import gzip
import os
import random
import re
from pathlib import Path

import pytest
from readings import (
    LIMIT,
    all_chunks,
    encoding,
    json_lines,
    packed,
    random_text,
    read,
    texts_of,
    tiny_pieces,
)

from megalite.errors import DataError
from megalite.preprocessing.workers import encode_in_order
from megalite.reading.chunks import Lines, Place, chunks
from megalite.reading.inputs import find_inputs


@pytest.fixture
def _tiny_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_pieces(monkeypatch)


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


@pytest.mark.parametrize("as_gzip", [False, True])
def test_a_file_is_cut_or_goes_while_it_is_read(tmp_path: Path, as_gzip: bool) -> None:
    """Workers read plain files again; what is packed is handed to them."""
    content = b'{"text": "a"}\n' * 100
    path = tmp_path / ("a.jsonl.gz" if as_gzip else "a.jsonl")
    for damage in (lambda: os.truncate(path, 10), lambda: os.unlink(path)):
        path.write_bytes(gzip.compress(content) if as_gzip else content)
        inputs, _ = find_inputs([str(path)])
        found = list(chunks(inputs, ("text",), "file", LIMIT, Place()))
        damage()
        if as_gzip:
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
