"""Which files are read, in which order, and what is said of those that are not there."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from megalite.reading.inputs import find_inputs, natural_key


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
