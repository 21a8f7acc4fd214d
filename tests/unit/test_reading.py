"""What is read is the inputs' records, in order, whatever their packing and wherever reading starts
anew. Compared with a plain reading of whole files."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from readings import all_chunks, json_lines, packed, random_text, read, texts_of, tiny_pieces


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
