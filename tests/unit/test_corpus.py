"""Text becomes documents, sequences and tokens as described, once; the cache repairs itself; what
is wrong with a text or a cache is named; the entropies are those of the tokens."""

from __future__ import annotations

import fcntl
import gzip
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalite.config import Config, resolve
from megalite.config_data import DataConfig
from megalite.data import corpus as corpus_module
from megalite.data import entropy as entropy_module
from megalite.data import texts as texts_module
from megalite.data.corpus import Corpus, prepare_corpus
from megalite.data.indexed_reader import IndexedReader
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.mixture import prepare_mixture
from megalite.data.sidecar import Sidecar, read_sidecar
from megalite.data.splits import open_samples
from megalite.data.texts import STDLIB_CAP_BYTES, stdlib_files
from megalite.errors import DataError
from megalite.preprocessing.inspection import open_dataset, verify

EOD = 256


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., Corpus]:
    """Prepare a text that is first written to `name`, with a cache of the test's own."""

    def run(content: bytes | str | None = None, name: str = "a.txt") -> Corpus:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return prepare_corpus(
            DataConfig(data=(str(path),), data_cache_path=str(tmp_path / "cache" / "deep"))
        )

    return run


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The sources that were tokenized, in order."""
    done: list[Path] = []
    tokenize = corpus_module._tokenize

    def record(source: corpus_module.Source, *others: Any) -> Sidecar:
        done.append(source.path)
        return tokenize(source, *others)

    monkeypatch.setattr(corpus_module, "_tokenize", record)
    return done


def documents(corpus: Corpus) -> list[list[list[int]]]:
    """Documents of sequences of tokens."""
    reader = IndexedReader(Path(corpus.prefix))
    ends = [0]
    for length in reader.lengths.tolist():
        ends.append(ends[-1] + length)
    sequences = [reader.tokens[a:b].tolist() for a, b in pairwise(ends)]
    return [sequences[a:b] for a, b in pairwise(reader.documents.tolist())]


def jsonl(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


# Tokens


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "one line without an end",
        "one line\n",
        "".join(f"line {i} {'y' * (i % 97)}\n" for i in range(2000)),
        "".join(f"line {i}\r\n" for i in range(2000)) + "no end",
        "\n" * 10_000,
        "z" * 20_000 + "\n" + "short\n" * 2000,
        "one long line, 1.2 MB, no end " * 40_000,
        "Ünïcode 中文 😀\n" * 500,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_a_text_file_is_one_document_cut_at_line_ends(
    prepare: Callable[..., Corpus], text: str
) -> None:
    corpus = prepare(text)
    (sequences,) = documents(corpus)
    tokens = [token for sequence in sequences for token in sequence]
    assert tokens == [*text.encode(), EOD]
    longest_line = max(len(line) for line in text.encode().splitlines(keepends=True))
    cut = [sequence for sequence in sequences if sequence != [EOD]]
    size = max(256, min(4096, len(text.encode()) // 64))
    for sequence in cut[:-1]:
        assert sequence[-1] == ord("\n") or longest_line > 2 * size
        assert size <= len(sequence) <= size + min(longest_line, 2 * size)
    assert len(cut[-1]) <= 3 * size + 1, "the end of the document counts too"
    if len(tokens) > 64 * 256 and longest_line < size:
        assert len(cut) >= 32, "a share of a twentieth is not empty"
    assert (corpus.documents, corpus.tokens) == (1, len(tokens))
    assert corpus.text_bytes == len(text.encode())
    assert corpus.max_token == EOD


def test_bytes_that_are_not_utf8_are_tokens_too(prepare: Callable[..., Corpus]) -> None:
    content = bytes(range(256)) * 3
    ((*sequences,),) = documents(prepare(content))
    assert [token for sequence in sequences for token in sequence] == [*content, EOD]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_jsonl_is_a_document_a_line(prepare: Callable[..., Corpus], name: str) -> None:
    texts = ["plain", "Ünïcode 中文 😀", "two\nlines", "x" * 10_000, "\0"]
    corpus = prepare(jsonl(*texts), name)
    encoded = [text.encode() for text in texts]
    assert documents(corpus) == [[[*text, EOD]] for text in encoded]
    assert (corpus.documents, corpus.max_token) == (len(texts), EOD)
    assert corpus.text_bytes == sum(map(len, encoded))
    assert corpus.tokens == corpus.text_bytes + len(texts)


def test_unusable_records_are_counted(prepare: Callable[..., Corpus]) -> None:
    bad = jsonl("lone \ud800 surrogate") + '{"body": 1}\n' * 6
    with pytest.raises(DataError) as error:
        prepare(jsonl("good") + bad, "a.jsonl")
    (told,) = error.value.violations
    first, *lines = told.splitlines()
    assert "a.jsonl: at least 7 records cannot be used; tools/preprocess_data.py leaves" in first
    assert lines[0].endswith("a.jsonl: line 2 holds half of a surrogate pair")
    assert [line.strip() for line in lines[4:]][1:] == ["..."]


def test_jsonl_as_others_write_it(prepare: Callable[..., Corpus]) -> None:
    """Blank lines, other fields, no escapes, a byte-order mark, no line end at the end."""
    content = (
        '\ufeff{"id": 1, "text": "é"}\n\n  \t\n{"text":"b","meta":{"text":1}}\r\n{"text": "c"}'
    )
    assert documents(prepare(content, "a.jsonl")) == [
        *([[*"é".encode(), EOD]], [[ord("b"), EOD]], [[ord("c"), EOD]])
    ]


def test_an_empty_text_is_a_document_without_tokens(prepare: Callable[..., Corpus]) -> None:
    corpus = prepare(jsonl("", "a", "", "", "b", ""), "a.jsonl")
    assert documents(corpus) == [[], [[97, EOD]], [], [], [[98, EOD]], []]
    assert (corpus.documents, corpus.tokens, corpus.text_bytes) == (6, 4, 2)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"text": "x"', "is not JSON"),
        ("text", "is not JSON"),
        ('{"text": "x"} {}', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (b'{"text": "\xff"}', "is not UTF-8: byte 0xff at 10"),
        ('{"content": "x"}', "has no key 'text'"),
        ("[]", "is no JSON object but an array"),
        ('"text"', "is no JSON object but a string"),
        ("3", "is no JSON object but a number"),
        ("null", "is no JSON object but null"),
        ('{"text": 3}', "has in key 'text' a number, not a string"),
        ('{"text": null}', "has in key 'text' null, not a string"),
        ('{"text": ["x"]}', "has in key 'text' an array, not a string"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_bad_line_is_named_by_its_number(
    prepare: Callable[..., Corpus], tmp_path: Path, line: bytes | str, sentence: str
) -> None:
    line = line.encode() if isinstance(line, str) else line
    with pytest.raises(DataError) as caught:
        prepare(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n', "a.jsonl")
    (found,) = caught.value.violations
    assert found.startswith(f"{tmp_path}/a.jsonl: line 3")
    assert sentence in found
    assert found.endswith("; tools/preprocess_data.py leaves out what cannot be used")
    left = {path.suffix for path in (tmp_path / "cache" / "deep").iterdir()}
    assert left <= {".lock"}, "no half of a corpus stays behind"


def test_packed_records_and_parquet_are_the_same_corpus(
    prepare: Callable[..., Corpus], tmp_path: Path
) -> None:
    pyarrow, zstandard = pytest.importorskip("pyarrow"), pytest.importorskip("zstandard")
    import pyarrow.parquet as parquet

    texts = ["plain", "", "Ünïcode 中文 😀", "two\nlines", "x" * 100_000]
    lines = jsonl(*texts).encode()
    parquet.write_table(pyarrow.table({"id": range(5), "text": texts}), tmp_path / "a.parquet")
    want = prepare(lines, "a.jsonl")
    for name, content in {
        "a.json.gz": gzip.compress(lines),
        "a.jsonl.zst": zstandard.compress(lines),
        "a.parquet": None,
    }.items():
        found = prepare(content, name)
        assert documents(found) == documents(want)
        assert (found.fingerprint, found.text_bytes) == (want.fingerprint, want.text_bytes)


def test_all_bad_records_near_each_other_are_told(
    prepare: Callable[..., Corpus], tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        prepare("{\n" * 3, "a.jsonl")
    assert [each.split(" is ")[0] for each in caught.value.violations] == [
        f"{tmp_path}/a.jsonl: line {i}" for i in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    ("content", "name"),
    [(jsonl("", ""), "a.jsonl"), ("\n\n", "a.jsonl"), ("", "a.jsonl"), ("", "a.txt")],
)
def test_a_corpus_without_text_is_refused(
    prepare: Callable[..., Corpus], tmp_path: Path, content: str, name: str
) -> None:
    with pytest.raises(DataError) as caught:
        prepare(content, name)
    assert caught.value.violations == [f"--data {tmp_path}/{name} holds no text"]


@pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl", "folder"])
def test_an_input_that_cannot_be_read_is_named(
    prepare: Callable[..., Corpus], tmp_path: Path, name: str
) -> None:
    """And the cache is not blamed."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError) as caught:
        prepare(None, name)
    (found,) = caught.value.violations
    assert f"{tmp_path}/{name}" in found
    assert "--data-cache-path" not in found


# The cache


def test_a_corpus_is_tokenized_once(prepare: Callable[..., Corpus], tokenized: list[Path]) -> None:
    first = prepare("hello\n")
    assert first == prepare()
    assert len(tokenized) == 1
    assert first.describe().startswith(f"{tokenized[0]}: 1 document, ")


@pytest.mark.parametrize(
    ("content", "later_ns"), [("hellO\n", 1000), ("hello\n", 1000), ("hello\nhello\n", 0)]
)
def test_a_changed_file_is_tokenized_again(
    prepare: Callable[..., Corpus],
    tmp_path: Path,
    tokenized: list[Path],
    content: str,
    later_ns: int,
) -> None:
    first = prepare("hello\n")
    before = (tmp_path / "a.txt").stat()
    (tmp_path / "a.txt").write_text(content)
    later = before.st_mtime_ns + later_ns
    os.utime(tmp_path / "a.txt", ns=(later, later))
    second = prepare()
    assert len(tokenized) == 2
    assert (second.fingerprint == first.fingerprint) == (content == "hello\n")
    assert prepare() == second


def test_two_files_have_two_corpora(prepare: Callable[..., Corpus], tokenized: list[Path]) -> None:
    first, second = prepare("one\n"), prepare("two\n", "b.txt")
    assert first.prefix != second.prefix
    assert documents(first)[0][0][:3] == [*b"one"]
    assert documents(second)[0][0][:3] == [*b"two"]


def test_fingerprints_follow_the_tokens_and_not_the_path(prepare: Callable[..., Corpus]) -> None:
    same = {prepare("one\n", name).fingerprint for name in ("a.txt", "b.txt")}
    assert len(same) == 1
    assert prepare("onE\n", "c.txt").fingerprint not in same


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def nested(path: Path) -> None:
    path.write_text("[" * 100_000)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [Path.unlink, cut, cut_to_nothing, nested, flip])
@pytest.mark.parametrize("suffix", ["bin", "idx", "json"])
def test_a_damaged_cache_is_built_again(
    prepare: Callable[..., Corpus],
    tokenized: list[Path],
    suffix: str,
    damage: Callable[[Path], None],
) -> None:
    first = prepare("hello\nworld\n" * 100)
    before = documents(first)
    damage(Path(f"{first.prefix}.{suffix}"))
    assert prepare() == first
    assert documents(first) == before
    assert len(tokenized) == 2


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_cached_corpus_is_a_dataset_with_a_sidecar(
    prepare: Callable[..., Corpus], tmp_path: Path, name: str
) -> None:
    """Tools take it for what it is, and `--data` takes its prefix."""
    text = "a line of text\n" * 3000
    corpus = prepare(jsonl("", text) if name == "a.jsonl" else text, name)
    sidecar = read_sidecar(corpus.prefix)
    assert sidecar is not None
    assert (sidecar.tokenizer_type, sidecar.append_eod) == ("ByteTokenizer", True)
    assert [(each.path, each.bytes) for each in sidecar.sources] == [
        (f"{tmp_path}/{name}", (tmp_path / name).stat().st_size)
    ]
    assert verify(open_dataset(Path(corpus.prefix)), lambda line: None) == []
    again = prepare_corpus(DataConfig(data=(corpus.prefix,)))
    assert again == replace(corpus, description=corpus.prefix)
    assert again.unigram_nats > 0


def test_a_cache_may_be_reached_by_another_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative to another folder, moved, or mounted elsewhere."""
    (tmp_path / "a.txt").write_text("hello\n")
    monkeypatch.chdir(tmp_path)
    first = prepare_corpus(DataConfig(data=("a.txt",), data_cache_path="cache"))
    before = documents(first)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    second = prepare_corpus(DataConfig(data=("../a.txt",), data_cache_path="../cache"))
    assert documents(second) == before
    (tmp_path / "cache").rename(tmp_path / "moved")
    third = prepare_corpus(DataConfig(data=("../a.txt",), data_cache_path=f"{tmp_path}/moved"))
    assert documents(third) == before


@pytest.mark.parametrize("below", ["", "/cache", "/deep/er"])
def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "a.txt").write_text("hello\n")
    folder = f"{tmp_path}/file{below}"
    with pytest.raises(DataError) as caught:
        prepare_corpus(DataConfig(data=(f"{tmp_path}/a.txt",), data_cache_path=folder))
    (found,) = caught.value.violations
    assert folder in found
    assert "--data-cache-path" in found


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A folder in the place of the lock: root may write everywhere else."""
    (tmp_path / "a.txt").write_text("hello\n")
    data = DataConfig(data=(f"{tmp_path}/a.txt",), data_cache_path=f"{tmp_path}/cache")
    corpus = prepare_corpus(data)
    Path(f"{corpus.prefix}.json").unlink()
    Path(f"{corpus.prefix}.lock").unlink()
    Path(f"{corpus.prefix}.lock").mkdir()
    with pytest.raises(DataError) as caught:
        prepare_corpus(data)
    (found,) = caught.value.violations
    assert f"{tmp_path}/cache" in found and "--data-cache-path" in found


def test_a_full_disk_is_named(
    prepare: Callable[..., Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(IndexedWriter, "add_sequence", full)
    with pytest.raises(DataError) as caught:
        prepare("hello\n")
    (found,) = caught.value.violations
    assert f"{tmp_path}/cache/deep: No space left on device" in found
    assert "--data-cache-path" in found
    assert {path.suffix for path in (tmp_path / "cache" / "deep").iterdir()} <= {".lock"}


def test_without_a_cache_path_the_users_cache_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("hello\n")
    data = DataConfig(data=(f"{tmp_path}/a.txt",))
    monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}/xdg")
    assert Path(prepare_corpus(data).prefix).parent == tmp_path / "xdg" / "megalite"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", f"{tmp_path}/home")
    assert Path(prepare_corpus(data).prefix).parent == tmp_path / "home/.cache/megalite"


_RACER = """
import json, sys, time
from dataclasses import asdict
from pathlib import Path
from megalite.config import Config, DataConfig, resolve
from megalite.data import corpus

tokenize = corpus._tokenize

def slow(*arguments):
    with open(sys.argv[1] + "/log", "a") as log:
        log.write("x")
    time.sleep(0.3)
    prepared = tokenize(*arguments)
    time.sleep(0.1)
    return prepared

corpus._tokenize = slow
Path(sys.argv[2]).touch()
while len(list(Path(sys.argv[1]).glob("ready*"))) < 3:
    time.sleep(0.001)
data = DataConfig(data=(sys.argv[1] + "/a.txt",), data_cache_path=sys.argv[1] + "/cache")
print(json.dumps(asdict(corpus.prepare_corpus(data))))
"""


def test_processes_at_once_prepare_one_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello\nworld\n" * 1000)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", _RACER, str(tmp_path), f"{tmp_path}/ready{i}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(3)
    ]
    outputs = {racer.communicate(timeout=60)[0] for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    (output,) = outputs
    assert (tmp_path / "log").read_text() == "x", "one tokenizes, the others wait"
    corpus = Corpus(**json.loads(output))
    assert corpus.text_bytes == 12_000
    assert len(IndexedReader(Path(corpus.prefix)).tokens) == corpus.tokens
    names = {path.suffix for path in (tmp_path / "cache").iterdir()}
    assert names == {".bin", ".idx", ".json", ".lock"}


# Entropies


def entropies(tokens: list[int]) -> tuple[float, float]:
    """H(x) of the tokens with one before them, and H(x | the one before), from counted pairs."""
    pairs = Counter(pairwise(tokens))
    before = Counter(tokens[:-1])
    after = Counter(tokens[1:])
    count = len(tokens) - 1
    unigram = -sum(n / count * math.log(n / count) for n in after.values())
    bigram = -sum(n / count * math.log(n / before[a]) for (a, _), n in pairs.items())
    return unigram, bigram


def stream(corpus: Corpus) -> list[int]:
    return [t for document in documents(corpus) for sequence in document for t in sequence]


TEXTS: dict[str, bytes] = {
    "periodic": b"ab" * 50_000,
    "random": random.Random(0).randbytes(1_000_000),
    "code": Path(corpus_module.__file__).read_bytes(),
    "one letter": b"a" * 5000,
    "two letters": b"ab",
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("chunk", [1 << 20, 1000])
def test_entropies(
    prepare: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch, name: str, chunk: int
) -> None:
    """However the counter cuts the stream."""
    monkeypatch.setattr(entropy_module, "_CHUNK_TOKENS", chunk)
    corpus = prepare(TEXTS[name])
    want = entropies(stream(corpus))
    assert (corpus.unigram_nats, corpus.bigram_nats) == pytest.approx(want, abs=1e-9)


def test_entropies_of_known_texts(prepare: Callable[..., Corpus]) -> None:
    periodic = prepare(TEXTS["periodic"])
    assert periodic.unigram_nats == pytest.approx(math.log(2), abs=1e-3)
    assert periodic.bigram_nats == pytest.approx(0.0, abs=1e-3)
    uniform = prepare(TEXTS["random"], "b.txt")
    assert uniform.unigram_nats == pytest.approx(math.log(256), abs=1e-3)
    # 65,536 cells for a million pairs: counting makes them look cells / (2 pairs) too regular.
    assert uniform.bigram_nats == pytest.approx(math.log(256) - 65_536 / 2e6, abs=3e-3)
    letters = prepare("a" * 5000, "c.txt")
    assert letters.unigram_nats == pytest.approx(0.0, abs=1e-2)


# The standard library


def library(folder: Path, **sizes: int) -> Path:
    for name, size in sizes.items():
        path = folder / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"#" * size)
    return folder


def test_library_files_leave_tests_and_installed_packages_out(tmp_path: Path) -> None:
    kept = {"os", "json/decoder", "email/mime/text", "testing", "pkg/tests_of/x"}
    left = {
        *("test/a", "json/tests/b", "site-packages/numpy/c", "dist-packages/d", "idle_test/e"),
        *("ensurepip/_bundled/f", "pip/_vendor/g", "lib-dynload/h", "__pycache__/i"),
    }
    library(tmp_path, **{name.replace("/", "__"): 1 for name in kept | left})
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "os.pyc").write_text("x")
    found = stdlib_files(tmp_path)
    assert {path.relative_to(tmp_path).with_suffix("").as_posix() for path in found} == kept


def test_the_order_of_library_files_is_fixed_and_unrelated_to_the_alphabet(tmp_path: Path) -> None:
    names = [f"{a}{b}" for a in "abcdefgh" for b in "xyz"]
    first = library(tmp_path / "one", **dict.fromkeys(names, 1))
    second = library(tmp_path / "two" / "deep", **dict.fromkeys(reversed(names), 1))
    orders = [[path.stem for path in stdlib_files(root)] for root in (first, second)]
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == names
    assert orders[0] not in (names, names[::-1])
    halves = Counter(name in names[:12] for name in orders[0][:12])
    assert min(halves[True], halves[False]) >= 3


def test_a_library_without_sources_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = library(tmp_path / "lib", a=1000, b=1000)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    with pytest.raises(DataError) as caught:
        prepare_corpus(DataConfig(data_cache_path=f"{tmp_path}/cache"))
    (found,) = caught.value.violations
    assert f"({root} holds 2 .py files)" in found
    assert found.endswith("give a text with --data")


def test_a_library_is_cut_at_its_cap_between_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts_module, "STDLIB_CAP_BYTES", 2500)
    monkeypatch.setattr(texts_module, "STDLIB_LEAST_BYTES", 4000)
    root = library(tmp_path / "lib", a=1000, b=1000, c=1000, d=1000)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    corpus = prepare_corpus(DataConfig(data_cache_path=f"{tmp_path}/cache"))
    assert documents(corpus) == [[[*b"#" * 1000, EOD]]] * 2
    assert corpus.description == f"source text of Python's standard library in {root}"


def test_the_built_in_corpus(tmp_path: Path, tokenized: list[Path]) -> None:
    """This Python's own: every file a document, in the order of `stdlib_files`."""
    data = DataConfig(data_cache_path=f"{tmp_path}/cache")
    corpus = prepare_corpus(data)
    assert prepare_corpus(data) == corpus
    assert len(tokenized) == 1
    root = Path(sysconfig.get_paths()["stdlib"])
    assert 1 << 20 < corpus.text_bytes <= STDLIB_CAP_BYTES
    reader = IndexedReader(Path(corpus.prefix))
    first = stdlib_files(root)[0].read_bytes()
    assert bytes(reader.tokens[: len(first)].astype("u1")) == first
    assert reader.tokens[len(first)] == EOD
    assert int((reader.tokens == EOD).sum()) == corpus.tokens - corpus.text_bytes
    assert 3.0 < corpus.unigram_nats < 3.5, "Python's sources"
    assert 2.0 < corpus.bigram_nats < 2.6


# Other sources


def test_random_tokens_need_no_cache(tmp_path: Path) -> None:
    corpus = prepare_corpus(DataConfig(mock_data=True, data_cache_path=f"{tmp_path}/cache"))
    assert (corpus.prefix, corpus.describe()) == ("", "random tokens")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_a_foreign_dataset_is_described_where_it_is(tmp_path: Path, suffix: str) -> None:
    writer = IndexedWriter(tmp_path / "p", np.dtype("<i4"))
    writer.add_sequence(np.array([5, 70_000, 3]))
    writer.end_document()
    writer.end_document()
    writer.close()
    data = DataConfig(data=(f"{tmp_path}/p{suffix}",), data_cache_path=f"{tmp_path}/cache")
    corpus = prepare_corpus(data)
    assert (corpus.prefix, corpus.documents, corpus.tokens) == (f"{tmp_path}/p", 2, 3)
    assert (corpus.max_token, corpus.text_bytes, corpus.unigram_nats) == (70_000, 0, 0.0)
    assert not (tmp_path / "cache").exists()
    changed = bytearray((tmp_path / "p.bin").read_bytes())
    changed[0] += 1
    (tmp_path / "p.bin").write_bytes(changed)
    assert prepare_corpus(data).fingerprint != corpus.fingerprint


def test_a_foreign_dataset_with_a_negative_token_is_refused(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "p", np.dtype("<i4"))
    writer.add_sequence(np.array([5, -7, 3]))
    writer.end_document()
    writer.close()
    with pytest.raises(DataError, match=r"p\.bin holds a negative token id, -7"):
        prepare_corpus(DataConfig(data=(f"{tmp_path}/p",)))


@pytest.mark.parametrize("text", ["a line of 40 kB\n" * 2500, "all in one line " * 75_000])
def test_a_text_of_any_shape_can_be_split(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    config = resolve(
        Config().replace(data=(str(tmp_path / "a.txt"),), data_cache_path=str(tmp_path))
    )
    train, valid, _ = open_samples(config, prepare_mixture(config.data))
    share = valid.num_samples / (train.num_samples + valid.num_samples)
    assert 0.02 < share < 0.08


def test_a_disk_that_fills_up_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("a line of text\n" * 20_000)
    cache = tmp_path / "cache"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with pytest.raises(DataError, match="cannot write the tokenized corpus"):
            prepare_corpus(DataConfig(data=(str(tmp_path / "a.txt"),), data_cache_path=str(cache)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_file_system_without_locks_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    (tmp_path / "a.txt").write_text("a line of text\n" * 100)
    monkeypatch.setattr(fcntl, "flock", unsupported)
    corpus = prepare_corpus(
        DataConfig(data=(str(tmp_path / "a.txt"),), data_cache_path=str(tmp_path))
    )
    assert corpus.text_bytes == 1500
