"""tools/train_tokenizer.py: models that the library reads and that give any text back; bad input
is told at once and leaves no file."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import vocabularies
from runs import ROOT, load_tool

tool = load_tool("train_tokenizer")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file, and the same as JSON Lines."""
    folder = tmp_path_factory.mktemp("corpus")
    text = vocabularies.training_text()[:60_000] + vocabularies.MIXED * 10
    (folder / "a.txt").write_text(text, encoding="utf-8")
    half = len(text) // 2
    records = ({"text": part, "other": 1} for part in (text[:half], text[half:]))
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def train(*flags: str | Path) -> int:
    """The tool's exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_tokenizer.py", *map(str, flags)])
        with pytest.raises(SystemExit) as ended:
            tool.end(tool.main)
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_trained_model(
    corpus: Path, tmp_path: Path, kind: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.model"
    code = train(
        *("--input", corpus / name, "--output", path, "--type", kind, "--vocab-size", 800),
        *("--user-symbols", "<|tool|>", "a,b", '"'),
    )
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    assert captured.out.startswith(f"{path}: 800 tokens, from ")
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert model.get_piece_size() == 800
    assert [model.id_to_piece(i) for i in (0, 1, 2)] == ["<unk>", "<s>", "</s>"]
    for symbol in ("<|tool|>", "a,b", '"'):
        tokens = model.encode(f"x{symbol}y")
        assert model.piece_to_id(symbol) in tokens and model.piece_to_id(symbol) != model.unk_id()
    for text in (vocabularies.MIXED, "  two  spaces\n\tand 𝒶 rare letter ", "1234"):
        tokens = model.encode(text)
        assert model.decode(tokens) == text, "nothing is normalized, nothing is dropped"
        assert model.unk_id() not in tokens
    assert [model.id_to_piece(i) for i in model.encode("1234")] == ["▁", "1", "2", "3", "4"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.model"]


def test_options_reach_the_model(corpus: Path, tmp_path: Path) -> None:
    common = ("--input", corpus / "a.txt", corpus / "a.jsonl", "--vocab-size", 600)
    assert train(*common, "--output", tmp_path / "plain.model", "--no-byte-fallback") == 0
    plain = sentencepiece.SentencePieceProcessor(model_file=f"{tmp_path}/plain.model")
    assert plain.unk_id() in plain.encode("𝒶")
    whole = ("--character-coverage", "1")
    assert train(*common, "--output", tmp_path / "whole.model", *whole) == 0
    model = sentencepiece.SentencePieceProcessor(model_file=f"{tmp_path}/whole.model")
    assert all(model.piece_to_id(letter) for letter in "ßлλ敏")
    assert train(*common, "--output", tmp_path / "few.model", *whole, "--max-lines", "500") == 0
    few = sentencepiece.SentencePieceProcessor(model_file=f"{tmp_path}/few.model")
    assert few.serialized_model_proto() != model.serialized_model_proto()


@pytest.mark.parametrize(
    ("flags", "pieces"),
    [((), ["▁in", "▁", "2", "0", "2", "4"]), (("--no-split-digits",), ["▁in", "▁2024"])],
)
def test_digits(tmp_path: Path, flags: tuple[str, ...], pieces: list[str]) -> None:
    (tmp_path / "a.txt").write_text("in 2024\n" * 500)
    path = tmp_path / "x.model"
    size = "--vocab-size", 268 if not flags else 271
    assert train("--input", tmp_path / "a.txt", "--output", path, *size, *flags) == 0
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert model.encode("in 2024", out_type=str) == pieces


def test_long_lines_are_trained_on(tmp_path: Path) -> None:
    """SentencePiece alone passes over lines of more than 4192 bytes."""
    (tmp_path / "a.txt").write_text("qz" * 5000 + "\0" + "vw" * 5000)
    path = tmp_path / "x.model"
    assert train("--input", tmp_path / "a.txt", "--output", path, "--vocab-size", 275) == 0
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = [model.id_to_piece(i) for i in range(275)]
    assert {"qz", "v", "w"} <= set(pieces)


BAD_FLAGS = {
    "--vocab-size 0": "--vocab-size 0 must be above 0",
    "--character-coverage 2": "--character-coverage 2.0 must be from 0.98 to 1",
    "--character-coverage nan": "--character-coverage nan must be from 0.98 to 1",
    "--threads 0": "--threads 0 must be above 0",
    "--max-lines -1": "--max-lines -1 must be 0, or 101 or more",
    "--user-symbols a a": "--user-symbols 'a' must be there once",
    "--user-symbols <s>": "--user-symbols '<s>' must be there once",
    "--input missing.txt": "--input missing.txt: there is no such file",
    "--input a.csv": "--input a.csv: there is no such file",
    "--input there.model": "--input there.model: there.model is no .jsonl, .json, .txt or ",
    "--input folder.txt": "--input folder.txt: the folder holds no .jsonl, .json, .txt or ",
    "--type wordpiece": "--type wordpiece is unknown; there are bpe, unigram",
    "--character-coverage all": "--character-coverage all: expected a number",
    "--max-document-mb 0": "--max-document-mb 0: from 1 to 1024",
    "--output x.bin": "--output x.bin: the name must end with .model",
    "--output there.model": "--output there.model exists; choose another name or remove it",
    "--output nowhere/x.model": "--output nowhere/x.model: there is no such folder",
    "--vocab-size 100000": "--vocab-size 100000 is more than this text gives: the most is ",
    "--vocab-size 20": "--vocab-size 20 has no room for the characters, bytes and symbols alone: ",
    "--input empty.txt": "the inputs hold no text",
    "--input bad.jsonl --strict": "--strict: bad.jsonl: line 2 is not JSON",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_input(
    corpus: Path,
    tmp_path: Path,
    flags: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "there.model").write_text("kept")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{\n')
    before = sorted(tmp_path.iterdir())
    defaults = ("--input", corpus / "a.txt", "--output", "x.model", "--vocab-size", "500")
    assert train(*defaults, *flags.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"megalite: {BAD_FLAGS[flags]}")
    assert captured.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there.model").read_text() == "kept"


def test_all_problems_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--input", "a.gz", "b.txt", "--output", "x", "--vocab-size", "0", "--vocab", "9")
    assert train(*flags, "--character-coverage", "0", "--user-symbols", "") == 2
    assert capsys.readouterr().err.startswith("megalite: 7 problems:\n")
    assert train() == 2
    assert capsys.readouterr().err == (
        "megalite: 2 problems:\n  - --input is missing\n  - --output is missing\n"
    )


def test_every_input_of_preprocessing_gives_the_same_model(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Packed, in a folder, and with records that cannot be used."""
    lines = (corpus / "a.jsonl").read_bytes()
    (tmp_path / "plain.jsonl").write_bytes(lines)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.jsonl").write_bytes(b'{"body": "zz"}\n\xff\n' + lines)
    models = []
    for name in ("plain.jsonl", "packed.jsonl.gz", "folder"):
        path = tmp_path / f"{name}.model"
        assert train("--input", tmp_path / name, "--output", path, "--vocab-size", 500) == 0
        models.append(path.read_bytes())
    assert models[0] == models[1] == models[2]
    *others, last = capsys.readouterr().out.split("next: ")[:3]
    assert not [each for each in others if "left out" in each]
    assert last.endswith(
        "\n2 records were left out:\n"
        f"  {tmp_path}/folder/x.jsonl: line 1 has no key 'text'\n"
        f"  {tmp_path}/folder/x.jsonl: line 2 is not UTF-8: byte 0xff at 0\n"
    )


def test_five_records_of_many_are_shown(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text("{\n" * 7)
    flags = ("--input", corpus / "a.txt", tmp_path / "bad.jsonl", "--vocab-size", 500)
    assert train(*flags, "--output", tmp_path / "x.model") == 0
    printed = capsys.readouterr().out
    assert "\n7 records were left out:\n" in printed
    assert [f"line {i} is not JSON" in printed for i in (1, 5, 6)] == [True, True, False]
    assert train("--input", tmp_path / "bad.jsonl", "--output", tmp_path / "y.model") == 2
    message = capsys.readouterr().err
    assert message.startswith("megalite: 6 problems:\n  - the inputs hold no text\n  - ")
    assert "bad.jsonl: line 1 is not JSON" in message


def test_a_disk_that_is_full(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(path: Path, content: bytes) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    path = tmp_path / "x.model"
    assert train("--input", corpus / "a.txt", "--output", path, "--vocab-size", 500) == 2
    assert capsys.readouterr().err == (
        f"megalite: --output {path} cannot be written: No space left on device\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_tool_starts_without_torch() -> None:
    code = (
        "import runpy, sys; runpy.run_path('tools/train_tokenizer.py'); "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
