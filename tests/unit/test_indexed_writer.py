"""The writer streams, goes on, concatenates and fails cleanly; its files are those that
megatron-core's own builder writes, and each reads the other's. The reader survives a cut file."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import resource
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megalite.data import indexed_writer
from megalite.data.indexed_reader import IndexedReader
from megalite.data.indexed_writer import FileSum, IndexedWriter, Written
from megalite.errors import DataError

Documents = list[list[list[int]]]


def random_documents(seed: int, largest: int = 60_000) -> Documents:
    draw = random.Random(seed)
    return [
        [
            [draw.randint(0, largest) for _ in range(draw.choice([1, 2, 3, 100, 1000]))]
            for _ in range(draw.choice([0, 1, 1, 2, 3]))
        ]
        for _ in range(draw.choice([0, 1, 2, 50]))
    ]


def add(writer: IndexedWriter, documents: Documents) -> IndexedWriter:
    for document in documents:
        for sequence in document:
            writer.add_sequence(np.array(sequence))
        writer.end_document()
    return writer


def files(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def written(prefix: Path, documents: Documents, dtype: str = "<u2") -> tuple[bytes, bytes]:
    add(IndexedWriter(prefix, np.dtype(dtype)), documents).close()
    return files(prefix)


@pytest.fixture(params=[1, 3, 1 << 20])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handled in blocks gives the same in blocks of any size."""
    monkeypatch.setattr(indexed_writer, "BLOCK", request.param)
    monkeypatch.setattr("megalite.data.indexed_reader.BLOCK", request.param)


# megatron-core


@pytest.fixture(scope="module")
def megatron() -> ModuleType:
    reason = "megatron-core is not installed: pip install 'megalite[test]' on Linux"
    pytest.importorskip("megatron.core", reason=reason, exc_type=ImportError)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the optional packages that it looks for
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<u1"])
@pytest.mark.parametrize("seed", range(4))
def test_files_are_those_of_megatron_core(
    megatron: ModuleType, tmp_path: Path, seed: int, dtype: str
) -> None:
    import torch

    documents = random_documents(seed, largest=255 if dtype == "<u1" else 60_000)
    builder = megatron.IndexedDatasetBuilder(f"{tmp_path}/theirs.bin", np.dtype(dtype).type)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(f"{tmp_path}/theirs.idx")
    assert written(tmp_path / "ours", documents, dtype) == files(tmp_path / "theirs")
    reader = IndexedReader(tmp_path / "theirs")
    assert reader.lengths.tolist() == [len(s) for d in documents for s in d]
    assert reader.tokens.tolist() == [t for d in documents for s in d for t in s]
    if not reader.num_tokens:
        return  # theirs cannot map an empty file
    theirs = megatron.IndexedDataset(f"{tmp_path}/ours")
    assert [each.tolist() for each in theirs] == [s for d in documents for s in d]
    assert theirs.document_indices.tolist() == reader.documents.tolist()


def test_the_golden_file_is_megatron_cores(megatron: ModuleType, tmp_path: Path) -> None:
    builder = megatron.IndexedDatasetBuilder(f"{tmp_path}/theirs.bin", np.uint16)
    for document in ([5, 6, 7, 2], [], [8, 9, 2]):
        builder.add_document(document, [len(document)] if document else [])
    builder.finalize(f"{tmp_path}/theirs.idx")
    documents = [[[5, 6, 7, 2]], [], [[8, 9, 2]]]
    assert written(tmp_path / "ours", documents) == files(tmp_path / "theirs")


def test_concatenation_is_megatron_cores(megatron: ModuleType, tmp_path: Path) -> None:
    names = [f"part{i}" for i in range(3)]
    theirs = megatron.IndexedDatasetBuilder(f"{tmp_path}/theirs.bin", np.uint16)
    ours = IndexedWriter(tmp_path / "ours", np.dtype("<u2"))
    for seed, name in enumerate(names):
        written(tmp_path / name, [*random_documents(seed + 10), [[seed]], []])
        theirs.add_index(f"{tmp_path}/{name}")
        ours.add_index(tmp_path / name)
    theirs.finalize(f"{tmp_path}/theirs.idx")
    ours.close()
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")


# Ways to write


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("seed", range(6))
def test_ways_to_write_give_equal_files(tmp_path: Path, seed: int) -> None:
    documents = random_documents(seed)
    expected = written(tmp_path / "a", documents)

    def add_together(writer: IndexedWriter, some: Documents) -> None:
        sequences = [np.array(s, np.int32) for d in some for s in d]
        writer.add_documents(
            np.concatenate([np.empty(0, np.int32), *sequences]),
            np.array([len(s) for s in sequences], np.int64),
            np.array([len(d) for d in some], np.int64),
        )

    half = len(documents) // 2
    together = IndexedWriter(tmp_path / "b", np.dtype("<u2"))
    add_together(together, documents[:half])
    add_together(together, documents[half:])
    together.close()
    written(tmp_path / "first", documents[:half])
    written(tmp_path / "second", documents[half:])
    copied = IndexedWriter(tmp_path / "c", np.dtype("<u2"))
    copied.add_index(tmp_path / "first")
    copied.add_index(tmp_path / "second")
    sums = copied.close()
    assert files(tmp_path / "b") == expected == files(tmp_path / "c")
    for name, content in zip(("bin", "idx"), expected, strict=True):
        assert sums[name] == FileSum(len(content), hashlib.sha256(content).hexdigest())
    assert not list(tmp_path.glob("*tmp*"))


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("seed", range(6))
def test_a_writer_goes_on_where_another_was(tmp_path: Path, seed: int) -> None:
    documents = [*random_documents(seed), [[1, 2]], [], [[3]]]
    expected = written(tmp_path / "a", documents)
    cut = seed % len(documents)
    first = add(IndexedWriter(tmp_path / "b", np.dtype("<u2"), tmp_path / "t"), documents[:cut])
    point = first.flush()
    add(first, random_documents(seed + 100))  # lost: not part of the point
    first.release()
    second = IndexedWriter(tmp_path / "b", np.dtype("<u2"), tmp_path / "t", point)
    add(second, documents[cut:]).close()
    assert files(tmp_path / "b") == expected
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin", "a.idx", "b.bin", "b.idx"}


@pytest.mark.parametrize("damage", ["bin", "lengths", "documents"])
@pytest.mark.parametrize("how", ["changed", "cut", "missing"])
def test_a_writer_does_not_go_on_from_other_files(tmp_path: Path, damage: str, how: str) -> None:
    first = add(
        IndexedWriter(tmp_path / "b", np.dtype("<u2"), tmp_path / "t"), [[[1, 2, 3]], [[4]]]
    )
    point = first.flush()
    first.release()
    path = tmp_path / f"t.{damage}"
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if how == "cut" else content[:-8] + b"\x07" * 8)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises((DataError, FileNotFoundError)):
        IndexedWriter(tmp_path / "b", np.dtype("<u2"), tmp_path / "t", point)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_dataset_of_another_dtype_is_not_appended(tmp_path: Path) -> None:
    written(tmp_path / "a", [[[1]]], "<i4")
    writer = IndexedWriter(tmp_path / "b", np.dtype("<u2"))
    with pytest.raises(DataError, match="int32 cannot follow those of uint16"):
        writer.add_index(tmp_path / "a")
    writer.discard()


def test_nothing_grows_with_the_dataset(tmp_path: Path) -> None:
    """A writer's objects have the same size after a hundred sequences and after many."""
    writer = IndexedWriter(tmp_path / "a", np.dtype("<u2"))

    def held() -> int:
        return sum(sys.getsizeof(value) for value in vars(writer).values())

    add(writer, [[[1]]] * 100)
    before = held()
    add(writer, [[[1]]] * 20_000)
    assert held() <= before + 64
    writer.discard()


# A full disk


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """In a process of its own, whose files may not grow above a limit."""
    before = written(tmp_path / "a", [[[1, 2, 3]]])
    code = f"""
        import numpy as np, resource, sys
        from pathlib import Path
        from megalite.data.indexed_writer import IndexedWriter
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        writer = IndexedWriter(Path({str(tmp_path / "a")!r}), np.dtype("<u2"))
        try:
            for i in range(100):
                writer.add_sequence(np.arange(1000))
                writer.end_document()
            writer.close()
        except OSError as error:
            writer.discard()
            sys.exit(error.errno)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == errno.EFBIG
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin", "a.idx"}
    assert files(tmp_path / "a") == before


# The reader


@pytest.fixture
def _few_files() -> Iterator[None]:
    """Few files may be open at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("_few_files")
def test_a_reader_that_is_gone_has_closed_its_files(tmp_path: Path) -> None:
    written(tmp_path / "a", [[[1, 2, 3]]])
    for _ in range(200):
        IndexedReader(tmp_path / "a")


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("seed", range(6))
def test_read_is_a_slice(tmp_path: Path, seed: int) -> None:
    documents = [*random_documents(seed), [[1, 2, 3]]]
    written(tmp_path / "a", documents)
    reader = IndexedReader(tmp_path / "a")
    flat = [t for d in documents for s in d for t in s]
    for start, stop in ((0, 0), (0, 1), (len(flat), len(flat)), (len(flat) // 2, len(flat))):
        found = reader.read(start, stop)
        assert found.tolist() == flat[start:stop]
        assert found.dtype == np.uint16
    assert (reader.pointers // 2).tolist() == np.cumsum([0, *reader.lengths])[:-1].tolist()


@pytest.mark.parametrize("size", [0, 1, 5000, 9999])
def test_a_file_that_shrinks_is_an_error_and_not_a_signal(tmp_path: Path, size: int) -> None:
    written(tmp_path / "a", [[[1] * 5000]])
    reader = IndexedReader(tmp_path / "a")
    os.truncate(tmp_path / "a.bin", size)
    with pytest.raises(DataError, match=rf"a\.bin: the file has become shorter.*ends at {size}"):
        reader.read(0, 5000)
    with pytest.raises(DataError, match=r"a\.bin: 10000 bytes expected by a.idx"):
        IndexedReader(tmp_path / "a")


@pytest.mark.parametrize("name", ["a.idx", "a.bin"])
def test_a_file_that_shrinks_while_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Cut between the check of its size and the first read of it: no SIGBUS."""
    written(tmp_path / "a", [[[1] * 5000]] * 2000)
    real = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        status = real(descriptor)
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(name):
            os.truncate(tmp_path / name, 100)
        return status

    monkeypatch.setattr(os, "fstat", fstat)
    with pytest.raises(DataError, match=rf"{name}: the file (has become|became) shorter"):
        IndexedReader(tmp_path / "a")


@pytest.mark.parametrize("name", ["a.idx", "a.bin"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, name: str) -> None:
    written(tmp_path / "a", [[[1]]])
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=f"{name}: not a regular file"):
        IndexedReader(tmp_path / "a")


def test_an_index_of_several_modes_is_named(tmp_path: Path) -> None:
    _, index = written(tmp_path / "a", [[[1]], [[2]]])
    (tmp_path / "a.idx").write_bytes(index + b"\0\1")
    with pytest.raises(DataError, match="as an index of several modes has"):
        IndexedReader(tmp_path / "a")


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("seed", range(40))
def test_a_changed_index_is_refused_wherever_it_is(tmp_path: Path, seed: int) -> None:
    """Every byte of an index means something: no other value of it passes."""
    documents = [[[1, 2], [3]], [], [[4, 5, 6]], [[7]]]
    _, index = written(tmp_path / "a", documents)
    draw = random.Random(seed)
    for _ in range(5):
        place = draw.randrange(len(index))
        if place == 17 or place in range(34 + 12 * 4 + 8, len(index) - 8):
            continue  # another dtype and another inner end of a document may be right too
        changed = bytearray(index)
        changed[place] ^= draw.randrange(1, 256)
        (tmp_path / "a.idx").write_bytes(changed)
        with pytest.raises(DataError):
            IndexedReader(tmp_path / "a")


def test_another_process_opens_the_files_anew(tmp_path: Path) -> None:
    import pickle

    written(tmp_path / "a.b", [[[1, 2, 3]]])
    sent = pickle.dumps(IndexedReader(tmp_path / "a.b"))
    assert len(sent) < 500
    assert pickle.loads(sent).read(1, 3).tolist() == [2, 3]


def test_written_is_what_the_files_hold(tmp_path: Path) -> None:
    writer = add(IndexedWriter(tmp_path / "a", np.dtype("<i4")), [[[1, 2], [3]], [], [[4]]])
    content = np.array([1, 2, 3, 4], "<i4").tobytes()
    assert writer.flush() == Written(4, 3, 3, hashlib.sha256(content).hexdigest())
    writer.discard()
