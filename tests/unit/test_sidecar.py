"""A dataset's sidecar: what it says is used instead of a scan, another tokenizer is refused, and a
sidecar of other files is noticed. And the flags and the progress line of the tools."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megalite.config_data import DataConfig
from megalite.data.corpus import prepare_corpus
from megalite.data.indexed_writer import FileSum, IndexedWriter
from megalite.data.mixture import prepare_mixture
from megalite.data.sidecar import Sidecar, SourceFile, read_sidecar, sidecar_path
from megalite.errors import ConfigError, DataError
from megalite.preprocessing.flags import Flag, read_flags
from megalite.preprocessing.inspection import histogram, open_dataset, statistics, verify
from megalite.preprocessing.merge import find_datasets, merge
from megalite.preprocessing.progress import ProgressLine, duration, summary
from megalite.preprocessing.run import Progress, Report
from megalite.tokenizer.byte import ByteTokenizer
from megalite.tokenizer.null import NullTokenizer


def dataset(prefix: Path, ids: list[int], dtype: str = "<u2", **other: object) -> Sidecar:
    """One document, and the sidecar of a byte tokenizer with some values changed."""
    writer = IndexedWriter(prefix, np.dtype(dtype))
    writer.add_sequence(np.array(ids))
    writer.end_document()
    sums = writer.close()
    sidecar = Sidecar(
        tokenizer_type="ByteTokenizer", tokenizer_fingerprint="byte-257", vocab_size=257, eod=256,
        append_eod=ids[-1] == 256, documents=1, sequences=1, tokens=len(ids),
        text_bytes=sum(token != 256 for token in ids),
        max_token=max(ids), left_out=0, bin=sums["bin"], idx=sums["idx"],
        sources=(SourceFile("a.jsonl", 17),),
    )  # fmt: skip
    sidecar = replace(sidecar, **other)  # type: ignore[arg-type]
    sidecar.write(sidecar_path(prefix))
    return sidecar


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_sidecar(tmp_path / "a") is None
    sidecar = dataset(tmp_path / "a", [1, 2, 256])
    assert read_sidecar(tmp_path / "a") == sidecar
    (tmp_path / "a.json").write_text('{"of": "somebody else"}')
    assert read_sidecar(tmp_path / "a") is None


def test_a_sidecar_of_before_entropies_were_kept_is_read(tmp_path: Path) -> None:
    sidecar = dataset(tmp_path / "a", [1, 2, 256], unigram_nats=1.5)
    path = tmp_path / "a.json"
    old = json.loads(path.read_text())
    assert old.pop("unigram_nats") == 1.5 and old.pop("bigram_nats") == 0.0
    path.write_text(json.dumps(old))
    assert read_sidecar(tmp_path / "a") == replace(sidecar, unigram_nats=0.0)


@pytest.mark.parametrize("change", [{"max_token": "7"}, {"tokens": None}, {"bin": {"bytes": 1}},
                                    {"append_eod": 1}, {"unigram_nats": "1"},
                                    {"bin": {"bytes": "a", "sha256": "b"}}, {"idx": [1]},
                                    {"sources": 1}, {"sources": [1]}, {"sources": [{"path": "a"}]},
                                    {"sources": [{"path": 1, "bytes": 2}]},
                                    {"sources": [{"path": "a", "bytes": "b"}]}])  # fmt: skip
def test_a_damaged_sidecar_is_named(tmp_path: Path, change: dict[str, object]) -> None:
    dataset(tmp_path / "a", [1])
    path = tmp_path / "a.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (name,) = change
    with pytest.raises(DataError, match=rf"a\.json is damaged: {name.removesuffix('s')}") as caught:
        read_sidecar(tmp_path / "a")
    assert "__init__" not in caught.value.violations[0]
    assert caught.value.violations[0].endswith("; remove the sidecar or preprocess again")


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\xff"])
def test_a_sidecar_that_is_no_json_is_named(tmp_path: Path, text: str) -> None:
    dataset(tmp_path / "a", [1])
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"a\.json is damaged"):
        read_sidecar(tmp_path / "a")


def test_a_sidecar_of_other_files_is_noticed(tmp_path: Path) -> None:
    dataset(tmp_path / "a", [1, 2, 3])
    sidecar = (tmp_path / "a.json").read_text()
    dataset(tmp_path / "a", [1, 2, 3, 4])
    (tmp_path / "a.json").write_text(sidecar)
    with pytest.raises(DataError, match=r"describes a \.bin of 6 bytes, but .* has 8"):
        read_sidecar(tmp_path / "a")


def test_a_run_takes_the_sidecars_figures(tmp_path: Path) -> None:
    """Values that no scan would find: they come from the sidecar."""
    dataset(tmp_path / "a", [1, 2, 256], max_token=255)
    corpus = prepare_corpus(DataConfig(data=(str(tmp_path / "a"),)))
    assert (corpus.max_token, corpus.documents, corpus.tokens) == (255, 1, 3)
    assert corpus.text_bytes == 2
    (tmp_path / "a.json").unlink()
    without = prepare_corpus(DataConfig(data=(str(tmp_path / "a"),)))
    assert corpus.fingerprint == without.fingerprint, "of the files, whatever stands beside them"


def shuffled(prefix: Path, order: list[int]) -> None:
    """Three documents of different lengths, written in an order."""
    texts = [[1, 256], [2, 2, 256], [3, 3, 3, 256]]
    writer = IndexedWriter(prefix, np.dtype("<u2"))
    for number in order:
        writer.add_sequence(np.array(texts[number]))
        writer.end_document()
    writer.close()


@pytest.mark.parametrize("head", [1 << 24, 4])
def test_a_sidecar_of_the_documents_in_another_order_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: int
) -> None:
    """Both files have the sizes that the sidecar says."""
    monkeypatch.setattr("megalite.data.corpus.HEAD_TOKENS", head)
    prefix, data = tmp_path / "a", DataConfig(data=(str(tmp_path / "a"),))
    shuffled(prefix, [0, 1, 2])
    idx = hashlib.sha256((tmp_path / "a.idx").read_bytes()).hexdigest()
    bin_ = hashlib.sha256((tmp_path / "a.bin").read_bytes()).hexdigest()
    right = dataset(tmp_path / "b", [1], documents=3, sequences=3, tokens=9, max_token=256,
                    bin=FileSum(18, bin_), idx=FileSum(34 + 3 * 12 + 4 * 8, idx))  # fmt: skip
    right.write(sidecar_path(prefix))
    before = prepare_corpus(data).fingerprint
    shuffled(prefix, [2, 1, 0])
    assert read_sidecar(prefix) == right, "by sizes it fits"
    with pytest.raises(DataError) as caught:
        prepare_corpus(data)
    (sentence,) = caught.value.violations
    assert sentence.startswith(
        f"{prefix} is not the dataset that its sidecar {prefix}.json describes: the SHA-256 of its "
        ".idx is "
    )
    assert ("SHA-256 of its .bin is" in sentence) == (head > 9), "if it was read whole"
    assert sentence.endswith("remove the sidecar or preprocess again")
    (tmp_path / "a.json").unlink()
    assert prepare_corpus(data).fingerprint != before


@pytest.mark.parametrize("name", ["documents", "sequences", "tokens"])
def test_a_sidecar_of_other_numbers_is_refused(tmp_path: Path, name: str) -> None:
    dataset(tmp_path / "a", [1, 2, 256], **{name: 7})
    with pytest.raises(DataError, match=rf"it has \d {name[:-1]}s?, not 7: remove the sidecar"):
        prepare_corpus(DataConfig(data=(str(tmp_path / "a"),)))


@pytest.mark.parametrize("words", ["a b", "0.5 a 0.5 b", "valid", "test", "text"])
def test_one_run_does_not_mix_tokenizers(tmp_path: Path, words: str) -> None:
    """Although none is named."""
    a, b, text = (str(tmp_path / name) for name in ("a", "b", "c.txt"))
    Path(text).write_text("some text\n" * 100)
    dataset(tmp_path / "a", [1, 2, 3], tokenizer_type="Llama2Tokenizer", tokenizer_fingerprint="sp")
    dataset(tmp_path / "b", [4, 5, 6])
    cache = str(tmp_path / "cache")
    data = {
        "valid": DataConfig(train_data_path=(a,), valid_data_path=(b,)),
        "test": DataConfig(train_data_path=(a,), test_data_path=(b,)),
        "text": DataConfig(data=(a, text), data_cache_path=cache),
    }.get(words) or DataConfig(
        data=tuple(f"{tmp_path}/{w}" if w in "ab" else w for w in words.split())
    )
    with pytest.raises(DataError) as caught:
        prepare_mixture(data)
    other = text if words == "text" else b
    assert caught.value.violations == [
        f"{other} was tokenized with ByteTokenizer (byte-257), but {a} with Llama2Tokenizer (sp): "
        "preprocess them with one tokenizer"
    ]
    dataset(tmp_path / "a", [1, 2, 3], tokenizer_type="another name of it")
    prepare_mixture(data)


def test_a_run_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    prefix = tmp_path / "a"
    dataset(prefix, [1, 2, 3], tokenizer_type="Llama2Tokenizer", tokenizer_fingerprint="sp-1")
    named = DataConfig(data=(str(prefix),), tokenizer_type="ByteTokenizer")
    with pytest.raises(DataError) as caught:
        prepare_corpus(named, ByteTokenizer())
    assert caught.value.violations == [
        f"--data {prefix} was tokenized with Llama2Tokenizer (sp-1), but the tokenizer here is "
        "byte-257: give that one with --tokenizer-type and --tokenizer-model"
    ]
    corpus = prepare_corpus(DataConfig(data=(str(prefix),)), ByteTokenizer())
    assert corpus.text_bytes == 0, "no tokenizer was named: it is used, but its text is not known"
    dataset(prefix, [1, 2, 3], tokenizer_fingerprint=NullTokenizer(9).fingerprint)
    prepare_corpus(
        DataConfig(data=(str(prefix),), tokenizer_type="NullTokenizer"), NullTokenizer(9)
    )


# Merge and verify


def test_datasets_of_a_folder_stand_in_natural_order(tmp_path: Path) -> None:
    for i in (10, 9, 1):
        dataset(tmp_path / f"part_{i}", [i], unigram_nats=1.0)
    (tmp_path / "notes.txt").touch()
    prefixes = find_datasets(tmp_path)
    assert [prefix.name for prefix in prefixes] == ["part_1", "part_9", "part_10"]
    merged = merge(prefixes, tmp_path / "all")
    assert merged is not None
    assert (merged.documents, merged.max_token, len(merged.sources)) == (3, 10, 3)
    assert merged.unigram_nats == 0.0, "entropies do not add up"
    assert read_sidecar(tmp_path / "all") == merged
    assert verify(open_dataset(tmp_path / "all"), lambda line: None) == []
    assert open_dataset(tmp_path / "all").reader.tokens.tolist() == [1, 9, 10]


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    dataset(a, [1, 256])
    dataset(b, [2], "<i4", tokenizer_fingerprint="other")
    with pytest.raises(ConfigError) as caught:
        merge([a, b], c)
    assert caught.value.violations == [
        f"{b} holds int32, but {a} uint16",
        f"{b} has tokenizer_fingerprint other and append_eod False, but {a} byte-257 and True",
    ]
    with pytest.raises(ConfigError, match="is one of the datasets to merge"):
        merge([a, b], b)
    assert not list(tmp_path.glob("c*"))
    (tmp_path / "b.idx").unlink()
    with pytest.raises(ConfigError, match=r"b\.idx is missing"):
        find_datasets(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match=r"it holds no \.bin and \.idx"):
        find_datasets(tmp_path / "none")


def test_a_dataset_without_sidecar_makes_one_without(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    dataset(a, [1])
    dataset(b, [2])
    dataset(c, [3])
    (tmp_path / "b.json").unlink()
    assert merge([a, b], c) is None
    assert not (tmp_path / "c.json").exists(), "it described what was here before"
    assert open_dataset(c).reader.tokens.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("tokens", "other", "found"),
    [
        ([1, 300], {}, "holds token id 300, but its tokenizer has 257"),
        ([1, 2], {"max_token": 5}, "says max_token 5, found 2"),
        ([1, 2], {"documents": 3}, "says documents 3, found 1"),
        ([1, -2], {"dtype": "<i4"}, "holds a negative token id, -2"),
        ([1, 256], {"eod": 0}, "says append_eod true, but 1 of 1 document with tokens do not end"),
        ([1, 256], {"eod": 257}, "says eod 257, expected a token below 257"),
        ([1, 256], {"eod": -1}, "says eod -1, expected a token below 257"),
        ([1, 256], {"append_eod": False}, "says append_eod false, but every document ends with"),
        ([1, 255], {"append_eod": True}, "says append_eod true, but 1 of 1 document"),
        ([1, 256], {"text_bytes": 0}, "says text_bytes 0, but it has 1 token of text"),
        ([1, 256], {"text_bytes": -5}, "says text_bytes -5, but it has 1 token of text"),
        ([256], {"text_bytes": -5}, "says text_bytes -5, but it has 0 tokens of text"),
    ],
)
def test_verify_names_what_is_wrong(
    tmp_path: Path, tokens: list[int], other: dict[str, object], found: str
) -> None:
    dataset(tmp_path / "a", tokens, **other)  # type: ignore[arg-type]
    problems = verify(open_dataset(tmp_path / "a"), lambda line: None)
    assert [problem for problem in problems if found in problem], problems


def test_verify_finds_one_flipped_bit(tmp_path: Path) -> None:
    dataset(tmp_path / "a", [1, 2, 3])
    (tmp_path / "a.bin").write_bytes(b"\1\0\3\0\3\0")
    (problem,) = verify(open_dataset(tmp_path / "a"), lambda line: None)
    assert "a.bin: SHA-256" in problem


def test_histogram(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "a", np.dtype("<u2"))
    lengths = [0, 0, 1, 2, 3, 4, 7, 8, 1023, 1024]
    for length in lengths:
        if length:
            writer.add_sequence(np.zeros(length, np.int64))
        writer.end_document()
    writer.close()
    lines = histogram(open_dataset(tmp_path / "a")).splitlines()[1:]
    counts = {line[:23].strip(): int(line[23:].split()[0]) for line in lines}
    assert {span: count for span, count in counts.items() if count} == {
        "0": 2, "1": 1, "2 to 3": 2, "4 to 7": 2, "8 to 15": 1, "512 to 1,023": 1,
        "1,024 to 2,047": 1,
    }  # fmt: skip


# Flags and progress

FLAGS = (Flag("--input", "Files.", ()), Flag("--workers", "Processes.", 2),
         Flag("--kind", "Which.", "a", ("a", "b")), Flag("--strict", "Be so.", False))  # fmt: skip


def test_flags() -> None:
    def read(*argv: str) -> tuple[dict[str, object], list[str]]:
        return read_flags(argv, FLAGS, prog="x", description="", refused={"--lang": "of old"})

    defaults = {"input": (), "workers": 2, "kind": "a", "strict": False}
    assert read() == (defaults, [])
    given = read("--input", "a", "b", "--workers=3", "--kind", "b", "--strict")
    assert given == ({"input": ("a", "b"), "workers": 3, "kind": "b", "strict": True}, [])
    assert read("--input", "-")[0]["input"] == ("-",)
    wrong = read("x", "--workers", "1.5", "--kind", "c", "--input", "--lang", "--strick", "1")
    assert sorted(wrong[1]) == [
        "'x' stands alone: values follow a flag",
        "--input needs a value",
        "--kind c is unknown; there are a, b",
        "--lang is not in megalite: of old",
        "--workers 1.5: expected a whole number",
        "unknown flag --strick; did you mean --strict?",
    ]
    more = (Flag("--share", "Of it.", 0.5), Flag("--digits", "Each.", True))
    given = read_flags(
        ["--share", "0.25", "--no-digits"], more, prog="x", description="", refused={}
    )
    assert given == ({"share": 0.25, "digits": False}, [])
    assert read_flags([], more, prog="x", description="")[0] == {"share": 0.5, "digits": True}
    wrong = read_flags(["--share", "x"], more, prog="x", description="")
    assert wrong[1] == ["--share x: expected a number"]
    assert read("--workers", "1", "2")[1] == ["--workers takes one value; 2 is left over"]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def progress(documents: int, read: int) -> Progress:
    return Progress(documents, 3 * documents, 1_000_000 * documents, read, 1000, 2)


def test_progress_says_how_fast_and_how_long() -> None:
    now = [100.0]
    stream = io.StringIO()
    line = ProgressLine(stream, clock=lambda: now[0])
    line.show(progress(1000, 100))  # a resumed run's beginning
    for now[0], documents, read in ((104.0, 1020, 150), (110.0, 1100, 300), (111.0, 1101, 301)):
        line.show(progress(documents, read))
    line.close()
    assert stream.getvalue() == (
        " 30.0%  1,100 documents  3,300 tokens  10.0 MB/s  10 documents/s  ETA 0:35  2 left out\n"
    )


def test_progress_on_a_terminal_is_one_line() -> None:
    now = [0.0]
    stream = _Terminal()
    line = ProgressLine(stream, clock=lambda: now[0])
    for i in range(40):
        now[0] = i / 10
        line.show(progress(i, i))
    line.close()
    shown = stream.getvalue()
    assert "\n" not in shown
    assert 10 <= shown.count("\r") <= 22
    assert shown.endswith("\r\x1b[K"), "it is cleared"


def test_progress_by_documents() -> None:
    stream = io.StringIO()
    line = ProgressLine(stream, 10)
    for documents in (0, 4, 9, 11, 12, 35, 39, 40):
        line.show(progress(documents, 0))
    starts = [each.split()[1] for each in stream.getvalue().splitlines()]
    assert starts == ["11", "35", "40"]


@pytest.mark.parametrize("one", [True, False])
def test_one_is_told_in_the_singular(tmp_path: Path, one: bool) -> None:
    sidecar = dataset(tmp_path / "a", [7] if one else [7, 7], text_bytes=1 if one else 2)
    many = replace(sidecar, documents=2 if one else 4)
    shown = summary(Report({tmp_path / "a": many}, 1 if one else 2, ("a.jsonl: line 1 is bad",)))
    assert shown.splitlines()[0].endswith(
        "2 documents, 1 token of 1 byte of text"
        if one
        else "4 documents, 2 tokens of 2 bytes of text"
    )
    assert ("  1 of the documents is empty" in shown) == one
    assert ("  3 of the documents are empty" in shown) != one
    assert ("\n1 record was left out:\n  a.jsonl: line 1 is bad" in shown) == one
    assert ("\n2 records were left out:\n" in shown) != one
    figures = statistics(open_dataset(tmp_path / "a"))
    assert ("text       1 byte\n" in figures) == one
    assert "left out   0 records of 1 file" in figures


def test_duration() -> None:
    assert [duration(each) for each in (0, 59.6, 61, 3723)] == ["0:00", "1:00", "1:01", "1:02:03"]
