"""Inputs written and read in tests of reading."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from megalite.preprocessing.encode import Encoding, encode_chunk
from megalite.reading import chunks as chunks_module
from megalite.reading import streams
from megalite.reading.chunks import Chunk, Place, chunks
from megalite.reading.inputs import find_inputs
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


def tiny_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
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
