"""Packed files that are cut short, damaged, padded or made to explode: what can be read is, in
bounded memory, and the rest is named."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
from readings import packed, random_text, read, texts_of


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
    assert found == ([("a",)], [("a.jsonl.gz", 1, "is longer than 1 MB (--max-document-mb)")])
    assert peak < 12 << 20
