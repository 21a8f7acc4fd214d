"""Files of a checkpoint: every damage is found and named, hostile ones are refused, none is half
there."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import signal
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalite.checkpoint.directory import LOCK, Directory, Lock
from megalite.checkpoint.manifest import NAME
from megalite.checkpoint.parts import Part
from megalite.checkpoint.reader import Checkpoint
from megalite.checkpoint.regions import Rectangle, Region, covers_once, overlap, whole
from megalite.checkpoint.saver import Retention, SaveError, Saver
from megalite.checkpoint.tensor_file import PIECE_BYTES, lay_out, read_layout
from megalite.errors import ConfigError, DamagedError
from megalite.faults import Faults, parse

CPU = torch.device("cpu")
FACTS = {"config": {"derived": [], "model": {"num_layers": 1}}, "data": "x"}


def state(step: int) -> dict[str, Tensor]:
    """Different for each step, of all kinds of shapes."""
    generator = torch.Generator().manual_seed(step)
    return {
        "w": torch.randn(40, 30, generator=generator),
        "b": torch.randn(700, generator=generator).bfloat16(),
        "optimizer.state.steps": torch.tensor(float(step)),
        "optimizer.exp_avg.w": torch.randn(40, 30, generator=generator).double(),
    }


def parts(tensors: dict[str, Tensor]) -> list[Part]:
    return [
        Part(name, tuple(x.shape), whole(x.shape), x.reshape(-1)) for name, x in tensors.items()
    ]


def saver(path: Path, **options: Any) -> Saver:
    return Saver(path, 0, 1, dist.HashStore(), CPU, 20.0, **options)


def save(path: Path, step: int, **options: Any) -> Path:
    one = saver(path, **options)
    one.start(step, parts(state(step)), FACTS, 8 * step, 64 * step)
    saved = one.finish(is_last=True)
    assert saved is not None
    return saved.folder


def contents(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: checkpoint.whole(name) for name in checkpoint.tensors}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def test_what_is_read_is_what_was_written_by_safetensors_own_reader_too(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    checkpoint = Checkpoint.open(folder)
    assert same(contents(checkpoint), state(5))
    assert same(load_file(folder / "rank-00000.safetensors"), state(5))
    assert checkpoint.manifest.step == 5 and checkpoint.manifest.samples == 40
    assert checkpoint.manifest.facts == FACTS
    assert not checkpoint.damages()


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    save_file(state(3), tmp_path / "x.safetensors", metadata={"a": "b"})
    layout = read_layout(tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert {entry.name for entry in layout.entries} == set(file.keys())
    data = (tmp_path / "x.safetensors").read_bytes()
    for entry in layout.entries:
        values = state(3)[entry.name].reshape(-1).view(torch.uint8).numpy().tobytes()
        assert data[entry.at : entry.at + entry.num_bytes] == values


def test_pieces_are_of_one_tensor_and_no_longer_than_they_may_be() -> None:
    layout = lay_out([("a", "F32", (50_000_000,)), ("b", "BF16", (3,))], {})
    pieces = layout.pieces()
    assert [piece.name for piece in pieces] == ["", *["a"] * 3, "b"]
    assert max(piece.num_bytes for piece in pieces) == PIECE_BYTES
    assert sum(piece.num_bytes for piece in pieces) == layout.num_bytes


def test_no_file_is_opened_that_is_not_needed(tmp_path: Path) -> None:
    """Two ranks' halves of a matrix; who wants rows of the first never opens the second's file."""
    store, matrix = dist.HashStore(), torch.arange(24.0).view(6, 4)

    def rank(number: int) -> None:
        half = Region(3 * number, 0, 3, 4, 0, 12)
        values = matrix[3 * number : 3 * number + 3].reshape(-1)
        one = Saver(tmp_path, number, 2, store, CPU, 20.0)
        one.start(1, [Part("w", (6, 4), half, values)], {}, 0, 0)
        one.finish(is_last=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(rank, range(2)))
    checkpoint = Checkpoint.newest(tmp_path)
    (checkpoint.folder / checkpoint.manifest.files[1].name).unlink()
    part = Part("w", (6, 4), Region(1, 1, 2, 3, 0, 6), torch.empty(6))
    checkpoint.read(part)
    assert torch.equal(part.values.view(2, 3), matrix[1:3, 1:])
    with pytest.raises(DamagedError, match="rank-00001"):
        checkpoint.read(Part("w", (6, 4), Region(2, 0, 2, 4, 0, 8), torch.empty(8)))


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.full)])
def test_every_flipped_bit_is_found_and_named(tmp_path: Path, count: int) -> None:
    folder = save(tmp_path, 1)
    sizes = {path: path.stat().st_size for path in folder.iterdir()}
    entries = read_layout(folder / "rank-00000.safetensors").entries
    rng = random.Random(count)
    for _ in range(count):
        path = rng.choice(list(sizes))
        bit = rng.randrange(8 * sizes[path])
        flip(path, bit)
        try:
            found = [str(damage) for damage in Checkpoint.open(folder).damages()]
        except DamagedError as error:
            found = error.violations
        assert len(found) == 1 and path.name in found[0], (path, bit, found)
        hit = [e.name for e in entries if e.at <= bit // 8 < e.at + e.num_bytes]
        if path.name != NAME and hit:
            assert found[0].endswith(f"of {hit[0]}"), (bit, found)
        flip(path, bit)
    assert not Checkpoint.open(folder).damages()


@pytest.mark.parametrize("stride", [23, pytest.param(1, marks=pytest.mark.full)])
def test_every_flipped_bit_of_a_header_is_found(tmp_path: Path, stride: int) -> None:
    """One makes `[0,16]` the single number `[0.16]`. Every 23rd is of every place in a byte."""
    folder = save(tmp_path, 1)
    path = folder / "rank-00000.safetensors"
    data = path.read_bytes()
    end = data.index(b"}}") + 2
    for bit in range(0, 8 * end, stride):
        harmed = bytearray(data)
        harmed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(harmed)
        try:
            found = [str(damage) for damage in Checkpoint.open(folder).damages()]
        except DamagedError as error:
            found = error.violations
        assert len(found) == 1 and path.name in found[0], (bit, found)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and make its digest right again, as an attacker would."""
    path = folder / NAME
    body = json.loads(path.read_text())
    body.pop("sha256")
    change(body)
    text = json.dumps(body)
    digest = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(f'{{"sha256": "{digest}",' + text[1:])


def first_slice(body: dict[str, Any]) -> dict[str, Any]:
    return body["tensors"]["w"]["slices"][0]


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "outside": (lambda b: b["files"][0].update(name="../x.safetensors"), "no plain file name"),
    "absolute": (lambda b: b["files"][0].update(name="/etc/passwd"), "no plain file name"),
    "no name": (lambda b: b["files"][0].update(name=".."), "no plain file name"),
    "pickle": (lambda b: b["files"][0].update(name="data.pt"), "can't be read"),
    "absurd shape": (lambda b: b["tensors"]["w"].update(shape=[10**12, 10**6]), "elements"),
    "absurd slice": (lambda b: first_slice(b).update(rows=10**15, stop=3 * 10**16), "outside"),
    "negative": (lambda b: first_slice(b).update(start=-1), "is no count"),
    "no number": (lambda b: first_slice(b).update(start="0"), "is no count"),
    "overlap": (
        lambda b: b["tensors"]["w"].update(
            slices=[first_slice(b) | {"stop": 600}, first_slice(b) | {"start": 599, "stop": 1199}]
        ),
        "in one file twice",
    ),
    "gap": (lambda b: first_slice(b).update(stop=1199), "hold 1199 of 1200"),
    "no such file": (lambda b: first_slice(b).update(file=1), "not listed"),
    "wrong dtype": (lambda b: b["tensors"]["w"].update(dtype="F64"), "the manifest says F64"),
    "unknown dtype": (lambda b: b["tensors"]["w"].update(dtype="O"), "is of type 'O'"),
    "other shape": (lambda b: b["tensors"]["w"].update(shape=[30, 40]), "outside of its shape"),
    "missing tensor": (lambda b: b["tensors"].pop("w"), "has 'w'; the manifest differs"),
    "wrong size": (lambda b: b["files"][0].update(bytes=10), "bytes"),
    "wrong digest": (lambda b: b["files"][0].update(digest="00" * 32), "not that of its pieces"),
    "other version": (lambda b: b.update(version=99), "version 99"),
    "config": (lambda b: b.update(config=["x"]), "damaged"),
    "config of texts": (lambda b: b.update(config={"model": "x"}), "is no configuration"),
    "derived": (lambda b: b.update(config={"derived": [[1]]}), "names no derived fields"),
    "no tensors": (lambda b: b.pop("tensors"), "'tensors' is missing"),
    "tensors are a list": (lambda b: b.update(tensors=[1]), "damaged"),
    "deep": (lambda b: b.update(files=[[[[]]]]), "damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_refused_before_anything_is_taken(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, 1)
    change, words = HOSTILE[name]
    rewrite(folder, change)
    with pytest.raises(DamagedError, match=words) as refused:
        Checkpoint.open(folder)
    assert refused.value.code == 3
    assert str(folder) in refused.value.message()


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (struct.pack("<Q", 1 << 60), "no right length"),
        (struct.pack("<Q", 4) + b"null", "damaged"),
        (struct.pack("<Q", 5) + b"[" * 5, "damaged"),
        (b"abc", "no right length"),
    ],
)
def test_a_hostile_header_is_refused(tmp_path: Path, header: bytes, words: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(header)
    with pytest.raises(DamagedError, match=words):
        read_layout(path)


def test_a_planted_pickle_is_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    folder = save(tmp_path / "ck", 1)
    for name in (".metadata", "data.pt", "pytorch_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    checkpoint = Checkpoint.newest(tmp_path / "ck")
    assert same(contents(checkpoint), state(1)) and not checkpoint.damages()
    (folder / "rank-00000.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DamagedError):
        Checkpoint.open(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("harm", ["missing", "truncated", "longer", "link", "folder"])
def test_a_harmed_file_is_named_without_reading_it(tmp_path: Path, harm: str) -> None:
    folder = save(tmp_path, 1)
    path = folder / "rank-00000.safetensors"
    data = path.read_bytes()
    path.unlink()
    if harm == "truncated":
        path.write_bytes(data[:-1])
    elif harm == "longer":
        path.write_bytes(data + b"x")
    elif harm == "link":
        (tmp_path / "elsewhere").write_bytes(data)
        path.symlink_to(tmp_path / "elsewhere")
    elif harm == "folder":
        path.mkdir()
    with pytest.raises(DamagedError, match=r"rank-00000\.safetensors"):
        Checkpoint.open(folder)
    save(tmp_path, 0)
    assert Checkpoint.newest(tmp_path).manifest.step == 0


def random_region(rng: random.Random, rows: int, columns: int) -> Region:
    row, column = rng.randrange(rows), rng.randrange(columns)
    height, width = rng.randint(1, rows - row), rng.randint(1, columns - column)
    start = rng.randrange(height * width)
    return Region(row, column, height, width, start, rng.randint(start + 1, height * width))


def numbers_in(region: Region, columns: int) -> list[int]:
    """Of a region's elements in the whole, by their definition."""
    return [
        (region.row + i // region.columns) * columns + region.column + i % region.columns
        for i in range(region.start, region.stop)
    ]


def from_rectangles(region: Region, columns: int) -> list[int]:
    found = [-1] * region.length
    for r in region.rectangles():
        for i in range(r.rows):
            for j in range(r.columns):
                assert found[r.at + i * r.stride + j] == -1
                found[r.at + i * r.stride + j] = (r.row + i) * columns + r.column + j
    return found


def test_rectangles_and_what_two_have_in_common_follow_from_the_definition() -> None:
    rng = random.Random(0)
    for _ in range(400):
        rows, columns = rng.randint(1, 7), rng.randint(1, 7)
        a, b = (random_region(rng, rows, columns) for _ in range(2))
        assert len(list(a.rectangles())) <= 3
        assert from_rectangles(a, columns) == numbers_in(a, columns)
        source, target = numbers_in(a, columns), [-1] * b.length
        for one in a.rectangles():
            for other in b.rectangles():
                copy = overlap(one, other)
                for i in range(copy.rows if copy else 0):
                    for j in range(copy.columns):
                        at = copy.target_at + i * copy.target_stride + j
                        target[at] = source[copy.source_at + i * copy.source_stride + j]
        expected = [n if n in source else -1 for n in numbers_in(b, columns)]
        assert target == expected


def test_covering_once_is_told_from_gaps_and_overlaps() -> None:
    rng = random.Random(1)
    verdicts = set()
    for _ in range(600):
        rows, columns = rng.randint(1, 3), rng.randint(1, 3)
        regions = [random_region(rng, rows, columns) for _ in range(rng.randint(1, 3))]
        held = sorted(n for region in regions for n in numbers_in(region, columns))
        is_right = held == list(range(rows * columns))
        assert (covers_once((rows, columns), regions) == "") == is_right
        verdicts.add(is_right)
    assert verdicts == {True, False}
    assert overlap(Rectangle(0, 0, 1, 1, 0, 1), Rectangle(1, 0, 1, 1, 0, 1)) is None


def kill_while_saving(path: Path, delay_s: float) -> None:
    """A process that saves steps 2, 3, ... over and over, killed at some moment."""
    child = os.fork()
    if not child:
        try:
            one = saver(path, retention=Retention(keep_last=2))
            for step in range(2, 50):
                one.start(step, parts(state(step)), {}, 0, 0)
                one.finish()
        finally:
            os._exit(0)
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("count", [15, pytest.param(200, marks=pytest.mark.full)])
def test_a_kill_at_any_moment_leaves_whole_checkpoints(tmp_path: Path, count: int) -> None:
    rng = random.Random(count)
    reached = set()
    for number in range(count):
        path = tmp_path / str(number)
        save(path, 1)
        kill_while_saving(path, rng.uniform(0.0, 0.15))
        directory = Directory(path)
        newest = Checkpoint.newest(path)
        assert directory.steps()[0] == newest.manifest.step
        for step in directory.steps():
            checkpoint = Checkpoint.open(directory.folder(step))
            assert not checkpoint.damages()
            assert same(contents(checkpoint), state(step))
        reached.add(newest.manifest.step)
        directory.sweep()
        assert not list(path.glob("*.tmp-*"))
        save(path, 99)
        assert Checkpoint.newest(path).manifest.step == 99
    assert len(reached) > 2


POINTS = ["before-shard", "half-shard", "before-manifest", "before-rename", "after-rename"]


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point_of_a_save(tmp_path: Path, point: str) -> None:
    save(tmp_path, 1)
    child = os.fork()
    if not child:
        try:
            save(tmp_path, 2, faults=Faults(parse(f"kill:at={point}")))
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    step = 2 if point == "after-rename" else 1
    assert same(contents(Checkpoint.newest(tmp_path)), state(step))


@pytest.mark.parametrize("point", POINTS[:-1])
def test_a_full_disk_fails_one_save_and_leaves_nothing(tmp_path: Path, point: str) -> None:
    save(tmp_path, 1)
    one = saver(tmp_path, faults=Faults(parse(f"enospc:at={point},step=2")))
    for step in (2, 3):
        one.start(step, parts(state(step)), {}, 0, 0)
        saved = one.finish()
        assert saved is not None
        assert ("No space left on device" in saved.problem) == (step == 2)
    assert Directory(tmp_path).steps() == [3, 1]
    assert not list(tmp_path.glob("*.tmp-*"))


def test_a_run_ends_when_saves_fail_again_and_again_or_at_the_end(tmp_path: Path) -> None:
    one = saver(tmp_path, faults=Faults(parse("enospc:at=half-shard")))
    for step in (1, 2):
        one.start(step, parts(state(step)), {}, 0, 0)
        assert one.finish() is not None
    one.start(3, parts(state(3)), {}, 0, 0)
    with pytest.raises(SaveError, match="3 saves in a row failed: rank 0: No space left"):
        one.finish()
    one = saver(tmp_path, faults=Faults(parse("exc:at=before-manifest")))
    one.start(1, parts(state(1)), {}, 0, 0)
    with pytest.raises(SaveError, match="the last save failed"):
        one.finish(is_last=True)


def test_a_damaged_checkpoint_in_the_way_is_put_aside(tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    flip(folder / "rank-00000.safetensors", 8 * 5000)
    harmed = (folder / "rank-00000.safetensors").read_bytes()
    save(tmp_path, 7)
    assert not Checkpoint.open(folder).damages()
    (aside,) = tmp_path.glob("step-00000007.damaged-*")
    assert (aside / "rank-00000.safetensors").read_bytes() == harmed
    assert Directory(tmp_path).steps() == [7]


@pytest.mark.parametrize(
    ("retention", "left"),
    [
        (Retention(), [7, 6, 5, 4, 3, 2, 1]),
        (Retention(keep_last=1), [7]),
        (Retention(keep_last=2), [7, 6]),
        (Retention(keep_last=2, keep_every=3), [7, 6, 3]),
    ],
)
def test_which_ones_stay(tmp_path: Path, retention: Retention, left: list[int]) -> None:
    for step in range(1, 8):
        save(tmp_path, step, retention=retention)
    assert Directory(tmp_path).steps() == left


def test_a_damaged_newer_one_costs_no_good_one(tmp_path: Path) -> None:
    """The run fell back behind it: it is neither counted nor removed."""
    for step in (900, 1000):
        save(tmp_path, step)
    flip(Directory(tmp_path).folder(1000) / "rank-00000.safetensors", 8 * 5000)
    save(tmp_path, 950, retention=Retention(keep_last=1))
    assert Directory(tmp_path).steps() == [1000, 950]
    assert not Checkpoint.open(Directory(tmp_path).folder(950)).damages()


def test_one_that_reads_back_wrong_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr("megalite.checkpoint.saver.read_back", lambda *_: False)
    one = saver(tmp_path, retention=Retention(keep_last=1))
    one.start(2, parts(state(2)), {}, 0, 0)
    saved = one.finish()
    assert saved is not None and "something else than was written" in saved.problem
    assert Directory(tmp_path).steps() == [1]


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    first = Lock(tmp_path, "first")
    with pytest.raises(ConfigError, match="the run first writes there"):
        Lock(tmp_path, "second")
    first.release()
    Lock(tmp_path, "third").release()
    assert not (tmp_path / LOCK).exists()


def test_a_dead_run_s_lock_is_nobody_s(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        Lock(tmp_path, "killed")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / LOCK).exists()
    begun = time.monotonic()
    Lock(tmp_path, "next").release()
    assert time.monotonic() - begun < 5


def test_a_lock_of_another_container_says_nothing_of_processes_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process number is nobody's in this one, and it lives."""
    first = Lock(tmp_path, "first")
    owner = json.loads((tmp_path / LOCK).read_text())
    (tmp_path / LOCK).write_text(json.dumps(owner | {"pid": 2**22 + 1, "container": "pid:[1]"}))
    beats = threading.Thread(target=touch, args=(tmp_path / LOCK, 4.0))
    beats.start()
    with pytest.raises(ConfigError, match="the run first writes there"):
        Lock(tmp_path, "second")
    beats.join()
    first.release()


def touch(path: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        os.utime(path)
        time.sleep(0.05)


def test_who_lost_a_lock_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalite.checkpoint.directory.BEAT_S", 0.05)
    lock = Lock(tmp_path, "first")
    assert not lock.is_lost
    (tmp_path / LOCK).write_text(json.dumps({"run": "thief"}))
    deadline = time.monotonic() + 5
    while not lock.is_lost:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lock.release()
    assert (tmp_path / LOCK).exists(), "it is the other's"


def test_another_machine_s_lock_is_taken_once_it_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megalite.checkpoint.directory.STALE_S", 2.0)
    other = {"run": "far", "host": "elsewhere", "pid": 1, "boot": "x", "container": "y"}
    (tmp_path / LOCK).write_text(json.dumps(other))
    Lock(tmp_path, "ours").release()
    monkeypatch.setattr("megalite.checkpoint.directory.STALE_S", 60.0)
    (tmp_path / LOCK).write_text(json.dumps(other))
    child = os.fork()
    if not child:
        for _ in range(100):
            os.utime(tmp_path / LOCK)
            time.sleep(0.1)
        os._exit(0)
    try:
        with pytest.raises(ConfigError, match="the run far writes there, process 1 on elsewhere"):
            Lock(tmp_path, "ours")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
