"""The tools refuse what would have no effect, or could not be written, before they read a text;
what they have written themselves is no input."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from runs import load_tool

from megalite.data.indexed_writer import IndexedWriter
from megalite.data.sidecar import Sidecar, SourceFile, sidecar_path
from megalite.errors import ConfigError, DataError
from megalite.preprocessing.inspection import open_dataset, verify
from megalite.preprocessing.journal import Journal
from megalite.preprocessing.run import Progress, prepare
from megalite.preprocessing.settings import Settings
from megalite.reading.inputs import dataset_prefix, find_inputs

LONG = "x" * 300


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text, records, and a dataset `d` of one document of the bytes 1, 2 and 3."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text\n")
    Path("a.jsonl").write_text('{"text": "text"}\n')
    writer = IndexedWriter(Path("d"), np.dtype("<u2"))
    writer.add_sequence(np.array([65, 66, 67]))
    writer.end_document()
    sums = writer.close()
    Sidecar(
        tokenizer_type="ByteTokenizer", tokenizer_fingerprint="byte-257", vocab_size=257, eod=256,
        append_eod=False, documents=1, sequences=1, tokens=3, text_bytes=3, max_token=67,
        left_out=0, bin=sums["bin"], idx=sums["idx"], sources=(SourceFile("a.jsonl", 17),),
    ).write(sidecar_path("d"))  # fmt: skip


def refused(tool: str, words: str) -> list[str]:
    """What a tool says is wrong."""
    with pytest.raises(ConfigError) as error:
        load_tool(tool).main(words.split())
    return error.value.violations


PREPROCESS = "preprocess_data", "--input a.jsonl --output-prefix o "
INSPECT = "inspect_dataset", "--input d "
TRAIN = "train_tokenizer", "--input a.txt --output x.model "
NULL_OR_RANKS = "--tokenizer-type NullTokenizer or --tiktoken-pattern v1 or v2"
MODELS = (
    "--tokenizer-type SentencePieceTokenizer or GPTSentencePieceTokenizer or Llama2Tokenizer or "
    "TikTokenizer or HuggingFaceTokenizer"
)


@pytest.mark.parametrize(
    ("tool", "flags", "otherwise"),
    [
        (PREPROCESS, "--tokenizer-model nosuch", f"without {MODELS}"),
        (PREPROCESS, "--tiktoken-pattern gpt2", "without --tokenizer-type TikTokenizer"),
        (PREPROCESS, "--tiktoken-num-special-tokens 5", "without --tiktoken-pattern v1 or v2"),
        (PREPROCESS, "--vocab-size 70000", f"without {NULL_OR_RANKS}"),
        (PREPROCESS, "--text-documents line", "without a .txt --input"),
        (INSPECT, "--tokenizer-type ByteTokenizer", "without --document"),
        (INSPECT, "--ids", "without --document"),
        (INSPECT, "--document 0 --tokenizer-model nosuch", f"without {MODELS}"),
        (INSPECT, "--document 0 --ids --vocab-size 9", "with --ids, which are no text"),
        (TRAIN, "--threads 2", "without --type unigram"),
    ],
)
def test_a_flag_without_effect(tool: tuple[str, str], flags: str, otherwise: str) -> None:
    name, needed = tool
    flag = "--" + flags.rpartition("--")[2]
    assert refused(name, needed + flags) == [f"{flag} has no effect {otherwise}; leave it out"]


@pytest.mark.parametrize("lines", [1, 3, 100, -1])
def test_sentencepiece_draws_more_than_100_lines(lines: int) -> None:
    assert refused(TRAIN[0], f"{TRAIN[1]} --max-lines {lines}") == [
        f"--max-lines {lines} must be 0, or 101 or more"
    ]


# Looking into a dataset


@pytest.mark.parametrize("damaged", [False, True])
def test_a_document_is_shown_and_all_is_verified(
    damaged: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if damaged:
        Path("d.bin").write_bytes(b"A\0B\0D\0")
        (*_, checksum) = refused("inspect_dataset", "--input d --document 0 --verify")
        assert checksum.startswith("d.bin: SHA-256 ")
        return
    assert load_tool("inspect_dataset").main("--input d --document 0 --verify".split()) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first == "ABC"
    assert others[-1] == "figures and checksums: as the sidecar says"


def test_a_text_needs_a_tokenizer_that_somebody_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("d.json").unlink()
    (why,) = refused("inspect_dataset", "--input d --document 0")
    assert why.startswith("--document 0: no d.json says which tokenizer wrote it: give ")
    for flags, shown in (("--ids", "65 66 67"), ("--tokenizer-type ByteTokenizer", "ABC")):
        load_tool("inspect_dataset").main(["--input", "d", "--document", "0", *flags.split()])
        assert capsys.readouterr().out == f"{shown}\n"


def test_no_tokens_have_no_range() -> None:
    writer = IndexedWriter(Path("e"), np.dtype("<u2"))
    writer.end_document()
    writer.close()
    shown: list[str] = []
    assert not verify(open_dataset(Path("e")), shown.append)
    assert "token ids: none" in shown


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("parts", "is a folder; datasets in parts: parts/p2, parts/p10"),
        ("x", "there is neither x.bin nor x.idx; datasets in .: d"),
        ("parts/x", "there is neither parts/x.bin nor parts/x.idx; datasets in parts: "
                    "parts/p2, parts/p10"),
        ("no/x", "there is neither no/x.bin nor no/x.idx, nor a folder no"),
        ("many/x.bin", "there is neither many/x.bin nor many/x.idx; datasets in many: "
                       "many/0, many/1, many/2, many/3, many/4, ..."),
        ("none", "is a folder; datasets in none: none"),
    ],
)  # fmt: skip
def test_what_is_no_dataset_says_which_there_are(given: str, why: str) -> None:
    for folder, stems in {"parts": ["p10", "p2"], "many": map(str, range(6)), "none": ()}.items():
        Path(folder).mkdir()
        for stem in stems:
            Path(f"{folder}/{stem}.idx").touch()
    prefix = given.removesuffix(".bin")
    assert refused("inspect_dataset", f"--input {given}") == [f"--input {prefix}: {why}"]


@pytest.mark.parametrize("name", ["d", "d.bin", "d.idx", "d.json"])
def test_any_file_of_a_dataset_names_it(name: str) -> None:
    assert dataset_prefix(Path(name)) == open_dataset(Path(name)).prefix == Path("d")
    assert dataset_prefix(Path("other.json")) == Path("other.json"), "records"


# What is written


def test_what_was_written_is_no_input() -> None:
    Path("o.partial").mkdir()
    Path("o.partial/text.json").touch()
    assert [each.path for each in find_inputs(["."])[0]] == ["./a.jsonl", "./a.txt"]
    assert [each.path for each in find_inputs(["*.json*"])[0]] == ["a.jsonl"]
    assert find_inputs(["d.json"])[1] == [
        "--input d.json: d.json describes the .bin and .idx beside it, and is no text"
    ]


@pytest.mark.parametrize("key", ["a/b", "../x", "", "a\0b"])
def test_a_key_that_is_no_name(key: str) -> None:
    words = ["--input", "a.jsonl", "--output-prefix", "o", "--json-keys", "text", key]
    with pytest.raises(ConfigError) as error:
        load_tool("preprocess_data").main(words)
    why = f"{key!r} cannot be part of a file's name" if key else "needs a value"
    assert len(error.value.violations) == 1
    assert error.value.violations[0].endswith(why)


@pytest.mark.parametrize("count", [0, -1])
def test_a_number_of_partitions(count: int) -> None:
    assert refused("preprocess_data", f"{PREPROCESS[1]} --partitions {count}") == [
        f"--partitions {count}: a number of parts is 1 or more"
    ]


@pytest.mark.parametrize(
    ("tool", "flags", "why"),
    [
        ("preprocess_data", f"--input a.jsonl --output-prefix {LONG}", "is too long, 255 is"),
        ("preprocess_data", f"--input a.jsonl --output-prefix {LONG}/x", "there is no folder"),
        ("preprocess_data", "--input a.jsonl --output-prefix p", "p_text_document.bin is a folder"),
        (
            "preprocess_data",
            "--input a.jsonl --output-prefix p/",
            "a file's name is missing, as in p/corpus",
        ),
        (
            "merge_datasets",
            "--input m --output-prefix p/",
            "a file's name is missing, as in p/corpus",
        ),
        ("merge_datasets", "--input m --output-prefix no/x", "there is no folder no"),
        ("merge_datasets", f"--input m --output-prefix {LONG}", "is too long, 255 is"),
        ("merge_datasets", "--input m --output-prefix p_text_document", ".bin is a folder"),
        ("train_tokenizer", f"--input a.txt --output {LONG}.model", "is too long, 255 is"),
        ("train_tokenizer", f"--input a.txt --output {LONG}/x.model", "there is no such folder"),
        ("train_tokenizer", "--input a.txt --output y.model", "y.model is a folder"),
    ],
)
def test_an_output_that_cannot_be_written(tool: str, flags: str, why: str) -> None:
    Path("p_text_document.bin").mkdir()
    Path("y.model").mkdir()
    Path("m").mkdir()
    for suffix in ("bin", "idx", "json"):
        os.link(f"d.{suffix}", f"m/d.{suffix}")
    (problem,) = refused(tool, flags)
    assert why in problem


@pytest.mark.parametrize("call", ["mkdir", "fsync", "replace"])
def test_a_disk_that_fails(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clear message; what is encoded stays, and --resume goes on."""
    replace = os.replace

    def fail(*args: object, **named: object) -> None:
        if call == "replace" and not str(args[1]).startswith("o_"):
            return replace(*args)  # type: ignore[arg-type]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    job = prepare(Settings(("a.jsonl",), "o", workers=1))
    with pytest.raises(DataError, match="No space left on device") as error:
        job.run(lambda progress: None)
    monkeypatch.undo()
    if call == "mkdir":
        assert str(error.value) == "megalite: o.partial cannot be made: No space left on device"
        return
    assert "with --resume goes on" in str(error.value)


def test_a_journal_that_is_too_deep() -> None:
    Path("o.partial").mkdir()
    Path("o.partial/journal").write_text("[" * 100_000)
    with pytest.raises(DataError, match="journal is damaged"):
        Journal("o", resume=True).read({})


@pytest.mark.parametrize("name", ["text.bin", "text.lengths", "text.documents"])
@pytest.mark.parametrize("change", ["gone", "shorter", "another"])
def test_what_was_written_has_changed(name: str, change: str) -> None:
    """The remedy is told, and the folder stays."""
    job = prepare(Settings(("a.jsonl",), "o", workers=1))

    def stop(progress: Progress) -> None:
        if progress.documents:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.run(stop)
    path = Path("o.partial", name)
    if change == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"\x07" * (change == "another"))
    before = sorted(os.listdir("o.partial"))
    with pytest.raises(DataError) as error:
        prepare(Settings(("a.jsonl",), "o", workers=1, resume=True)).run(lambda progress: None)
    (why,) = error.value.violations
    assert why.endswith(": remove o.partial and start anew, without --resume")
    told = {"gone": f"{path} is missing", "shorter": f"{path}: ", "another": "not what was written"}
    assert told[change] in why
    assert sorted(os.listdir("o.partial")) == before
