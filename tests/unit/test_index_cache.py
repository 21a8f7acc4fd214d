"""An entry is built once, appears whole, and is built anew if anything in it is not as it was
written; a folder that cannot be written is named."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megalite.data import index_cache
from megalite.data.index_cache import Arrays, IndexCache
from megalite.errors import DataError

FACTS = {"content": "abc", "seed": 1}


class Builder:
    """Makes two arrays and counts how often it is asked."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def __call__(self, found: Arrays) -> Arrays:
        self.found.append(len(found.get("a", ())))
        return {"a": np.arange(10, dtype=np.int32), "b": np.arange(20).reshape(10, 2)}


@pytest.fixture
def builder() -> Builder:
    return Builder()


def check(arrays: Arrays) -> None:
    assert arrays["a"].tolist() == list(range(10))
    assert arrays["b"].tolist() == np.arange(20).reshape(10, 2).tolist()
    assert not arrays["a"].flags.writeable


def entry(folder: Path) -> Path:
    (found,) = (path for path in folder.iterdir() if path.is_dir())
    return found


def test_an_entry_is_built_once_and_mapped(tmp_path: Path, builder: Builder) -> None:
    for _ in range(3):
        check(IndexCache(tmp_path).get("kind", FACTS, builder))
    assert builder.found == [0]
    assert sorted(path.name for path in entry(tmp_path).iterdir()) == [
        *("a.npy", "b.npy", "entry.json")
    ]
    assert np.load(entry(tmp_path) / "a.npy").tolist() == list(range(10)), "any numpy reads it"
    assert json.loads((entry(tmp_path) / "entry.json").read_text())["facts"]["content"] == "abc"


@pytest.mark.parametrize("other", [{"content": "abd"}, {"seed": 2}, {"more": None}])
def test_other_facts_are_another_entry(tmp_path: Path, builder: Builder, other: dict) -> None:
    cache = IndexCache(tmp_path)
    cache.get("kind", FACTS, builder)
    cache.get("kind", {**FACTS, **other}, builder)
    cache.get("other", FACTS, builder)
    assert builder.found == [0, 0, 0]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 16
    path.write_bytes(content)
    os.utime(path, (1, 1))  # the clock of files may not have moved on since it was written


def swap(path: Path) -> None:
    """Objects, which only unpickling could read."""
    with open(path, "wb") as file:
        np.save(file, np.array([{"x": 1}], dtype=object), allow_pickle=True)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut": cut,
    "flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "pickled": swap,
}


@pytest.mark.parametrize("name", ["a.npy", "b.npy", "entry.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_built_anew(
    tmp_path: Path, builder: Builder, damage: str, name: str
) -> None:
    cache = IndexCache(tmp_path)
    before = cache.get("kind", FACTS, builder)["a"].copy()
    DAMAGE[damage](entry(tmp_path) / name)
    check(cache.get("kind", FACTS, builder))
    check(cache.get("kind", FACTS, builder))
    # Of a JSON text not every flip hurts.
    assert builder.found == [0, 0] or (damage, name) == ("flipped", "entry.json")
    assert before.tolist() == list(range(10))


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"files": []}', '{"files": {}}', '{"files": {"a": 1}}', '{"files": {"a": [1]}}',
     '{"files": {"a": {"crc32": [1]}, "b": {"crc32": 2}}}', '{"files": {"c": {"crc32": 2}}}',
     "[" * 100_000],
)  # fmt: skip
def test_an_entry_that_says_something_else_is_built_anew(
    tmp_path: Path, builder: Builder, content: str
) -> None:
    cache = IndexCache(tmp_path)
    cache.get("kind", FACTS, builder)
    (entry(tmp_path) / "entry.json").write_text(content)
    check(cache.get("kind", FACTS, builder))
    assert builder.found == [0, 0]


def test_arrays_are_read_through_only_if_their_files_have_changed(
    tmp_path: Path, builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of many processes maps what may have gigabytes."""
    cache = IndexCache(tmp_path)
    summed: list[int] = []
    checksum = index_cache._checksum
    monkeypatch.setattr(
        index_cache, "_checksum", lambda array: [summed.append(len(array)), checksum(array)][1]
    )
    cache.get("kind", FACTS, builder)
    assert summed == [10, 10], "when they are written"
    for _ in range(3):
        check(cache.get("kind", FACTS, builder))
    assert summed == [10, 10]
    os.utime(entry(tmp_path) / "b.npy", (1, 1))  # as in a copy of the folder
    check(cache.get("kind", FACTS, builder))
    assert summed == [10, 10, 10] and builder.found == [0]


def test_an_entry_with_too_few_rows_is_continued(tmp_path: Path) -> None:
    def build(rows: int) -> Callable[[Arrays], Arrays]:
        def extend(found: Arrays) -> Arrays:
            old = found.get("a", np.empty(0, np.int64))
            return {"a": np.concatenate([old, np.arange(len(old), rows)])}

        return extend

    cache = IndexCache(tmp_path)
    short = cache.get("kind", FACTS, build(5), rows=5)["a"]
    long = cache.get("kind", FACTS, build(9), rows=9)["a"]
    assert (short.tolist(), long.tolist()) == (list(range(5)), list(range(9)))
    assert len(cache.get("kind", FACTS, build(7), rows=7)["a"]) == 9, "what is there is enough"


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, builder: Builder) -> None:
    def fail(_: Arrays) -> Arrays:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        IndexCache(tmp_path).get("kind", FACTS, fail)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    check(IndexCache(tmp_path).get("kind", FACTS, builder))


def test_a_full_disk_is_named_and_leaves_nothing(
    tmp_path: Path, builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, array: np.ndarray, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(DataError, match=r"No space left on device.*--data-cache-path"):
        IndexCache(tmp_path).get("kind", FACTS, builder)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry that is there is used all the same."""
    cache = IndexCache(tmp_path)
    cache.get("kind", FACTS, builder)
    opened = open

    def read_only(path: object, mode: str = "r", *args: object, **kwargs: object) -> object:
        if "w" in mode:
            raise OSError(30, "Read-only file system")
        return opened(path, mode, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr("builtins.open", read_only)
    check(cache.get("kind", FACTS, builder))
    with pytest.raises(DataError) as caught:
        cache.get("kind", {"seed": 2}, builder)
    (sentence,) = caught.value.violations
    assert sentence == (
        f"the cache folder {tmp_path} cannot be written: Read-only file system; give another one "
        "with --data-cache-path"
    )


def _process(folder: str, barrier: object, done: object) -> None:
    def build(_: Arrays) -> Arrays:
        with open(f"{folder}/built", "a") as log:
            log.write(f"{os.getpid()}\n")
        time.sleep(0.3)  # others arrive meanwhile
        return {"a": np.arange(500_000)}

    barrier.wait()  # type: ignore[attr-defined]
    array = IndexCache(Path(folder)).get("kind", FACTS, build)["a"]
    done.put(int(array.sum()))  # type: ignore[attr-defined]


def test_many_processes_build_once_and_all_see_it_whole(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, done = context.Barrier(6), context.Queue()
    processes = [
        context.Process(target=_process, args=(str(tmp_path), barrier, done)) for _ in range(6)
    ]
    for process in processes:
        process.start()
    sums = [done.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert sums == [500_000 * 499_999 // 2] * 6
    assert len((tmp_path / "built").read_text().splitlines()) == 1


def test_where_there_are_no_locks_the_first_to_finish_may_win(
    tmp_path: Path, builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process puts its entry there between our two renames."""
    cache = IndexCache(tmp_path)
    cache.get("kind", FACTS, builder)
    damaged = entry(tmp_path)
    whole = tmp_path / "of another process"
    shutil.copytree(damaged, whole)
    cut(damaged / "a.npy")
    rename = os.rename

    def rename_and_lose(source: Path, target: Path) -> None:
        rename(source, target)
        if source == damaged:
            rename(whole, damaged)

    monkeypatch.setattr(os, "rename", rename_and_lose)
    check(cache.get("kind", FACTS, builder))
    assert builder.found == [0, 0] and not whole.exists()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".lock"]
