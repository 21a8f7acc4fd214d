"""With orjson or without, records are the same, and so is what is said of those left out."""

from __future__ import annotations

import random

import pytest

from megalite.reading import records
from megalite.reading.chunks import Chunk, Lines, Place

LIMIT = 1 << 20

WHOLE = [
    '{"text": "a\\u00e9\\ud83d\\ude00\\n\\/", "id": 1e3}',
    '{"meta": {"a": [1, {"text": 2}]}, "text": "naïve 日本語 🎉", "text": "the last one"}',
    '{"text": "", "n": [NaN, -Infinity, 1e999, 123456789012345678901234567890]}',
    '{"text": "half \\ud83d", "b": true}',
]
OBJECT = '{"a":'
ODD = [
    *("[]", "7", '"text"', "null", "{}", "", '{"text": null}', '{"text": ["a"]}'),
    '{"text": "x", "digits": ' + "1" * 5000 + "}",
    '{"text": "a"}\x00',
    '\ufeff{"text": "a"}',
    '{"text": "a"}\xa0',
    '{"te\\u0078t": "key"}',
    '{"\\ud800": 1, "text": "a"}',
    '{"text": "first", "text": 2}',
    '{"text": 1, "text": "last"}',
    '{"text": "' + "[{" * 500 + '"}',
    *(f'{{"text": "x", "deep": {"[" * deep}{"]" * deep}}}' for deep in (100, 300, 990, 3000)),
    f'{{"deep": {"[" * 990}{"]" * 990}, "deep": 1, "text": "hidden"}}',
    f'{{"deep": {OBJECT * 990}1{"}" * 990}, "deep": 1, "text": "hidden"}}',
]
BYTES = [b'{"text": "\xff"}', b'{"text": "\xed\xa0\x80"}', b'{"text": "\xc0\x80"}', b'\xef\xbb{"']
PIECES = [
    *('"', "\\", "\\u", "d83d", "\\x41", "'", "{", "}", "[", "]", ",", ":", "//"),
    *("0", "1.", "-", "e", "+", "true", "é"),
    *(" ", "\t", "\r", "\x01", "\x7f", "\0", "\xa0", "\ufeff", "\u2028"),
]


def damaged_lines(count: int) -> list[bytes]:
    draw = random.Random(9)
    lines = []
    for _ in range(count):
        text = draw.choice(WHOLE)
        for _ in range(draw.randrange(1, 3)):
            at = draw.randrange(len(text) + 1)
            text = text[:at] + draw.choice(["", *PIECES]) + text[at + draw.randrange(3) :]
        lines.append(text.encode())
    return lines


def test_orjson_changes_no_record_and_no_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of records, damaged ones, and those that one of the two readers takes and one refuses."""
    pytest.importorskip("orjson")
    lines = [text.encode() for text in WHOLE + ODD] + BYTES + damaged_lines(20_000)
    lines += [line[: len(line) // 2] + b"\xff" + line[len(line) // 2 :] for line in lines[:50]]
    chunk = Chunk((Lines(0, 1, b"\n".join(lines), "json"),), (), Place(), 0)
    read = [records.texts(chunk, keys, LIMIT) for keys in (("text",), ("text", "id"))]
    monkeypatch.setattr(records, "orjson_loads", None)
    assert read == [records.texts(chunk, keys, LIMIT) for keys in (("text",), ("text", "id"))]
    good, bad = read[0]
    assert min(len(good), len(bad)) > 2000
    assert any("recursion" in each.why for each in bad), "Python's json runs out of stack"


def test_orjson_reads_common_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's json is not asked at all."""
    pytest.importorskip("orjson")
    monkeypatch.delattr(records, "_json_fields")
    lines = b'{"text": "a", "meta": {"b": [1, 2]}}\n{"text": "\xc3\xa9 \\u00e9"}'
    chunk = Chunk((Lines(0, 1, lines, "json"),), (), Place(), 0)
    assert records.texts(chunk, ("text",), LIMIT) == ([("a",), ("é é",)], [])
