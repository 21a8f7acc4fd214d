"""The ledger names the documents of a step's global batch from the saved configuration alone: they
are the ones that the step's batch is made of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import data_config, open_data, write_dataset

from megalite.config import Config
from megalite.config_file import read_saved
from megalite.data.__main__ import main
from megalite.data.indexed_reader import IndexedReader
from megalite.data.ledger import ledger
from megalite.data.loader import Loader
from megalite.data.mixture import prepare_mixture
from megalite.data.record import read_record, record_of
from megalite.data.token_store import TokenStore
from megalite.errors import ConfigError
from megalite.tokenizer.choose import open_tokenizer


def document(prefix: Path | str, number: int) -> list[int]:
    """Tokens of a document, by the two files."""
    reader = IndexedReader(Path(prefix))
    ends = [0, *np.cumsum(reader.lengths).tolist()]
    first, last = reader.documents[number : number + 2].tolist()
    return reader.tokens[ends[first] : ends[last]].tolist()


def save(config: Config, folder: Path) -> Path:
    """A run's folder as pretraining leaves it."""
    run = folder / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(config.to_saved()))
    tokenizer = open_tokenizer(config.data, config.model.vocab_size)
    record_of(prepare_mixture(config.data, tokenizer), tokenizer.fingerprint).write(run)
    return run


@pytest.mark.parametrize("order", ["epoch", "megatron"])
@pytest.mark.parametrize("weights", [False, True])
def test_the_documents_are_those_of_the_batch(tmp_path: Path, order: str, weights: bool) -> None:
    sets = [write_dataset(tmp_path / name, seed, gaps=True) for seed, name in enumerate("ab")]
    words = [0.6, sets[0], 0.4, sets[1]] if weights else sets
    config = data_config(tmp_path, *words, data_order=order)
    run = save(config, tmp_path)
    saved = read_saved(run / "config.json")
    assert saved == config
    group: Any = SimpleNamespace(rank=0, size=1)
    loader = Loader(config, *open_data(config), group, torch.device("cpu"))
    for step in (1, 10):
        batch = loader.train_batch(step - 1)
        rows = torch.cat([mb.tokens for mb in batch.micro_batches]).tolist()
        labels = torch.cat([mb.labels for mb in batch.micro_batches])[:, -1].tolist()
        entries = ledger(saved, step, read_record(run))
        assert [entry.place for entry in entries] == list(range(8))
        for entry, row, label in zip(entries, rows, labels, strict=True):
            found: list[int] = []
            for piece in entry.pieces:
                whole = document(piece.dataset, piece.document)
                assert 0 <= piece.start < piece.stop <= len(whole)
                found += whole[piece.start : piece.stop]
            assert found == [*row, label]
            assert entry.texts == (None,) * len(entry.pieces), "no tokenizer is known"


def test_pieces_of_documents_without_tokens_and_of_many_sequences(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "a", 5, 40, 9, gaps=True)
    reader = IndexedReader(prefix)
    assert 0 in np.diff(reader.documents) and 2 in np.diff(reader.documents), "both occur"
    store = TokenStore(reader, "a", 1000)
    tokens = reader.tokens.tolist()
    for start in range(0, len(tokens) - 20, 3):
        spans = [(start, start + 20)]
        pieces = store.pieces(spans)
        again = [document(prefix, p.document)[p.start : p.stop] for p in pieces]
        assert np.concatenate(again).tolist() == tokens[start : start + 20]
        assert store.gather(spans).tolist() == tokens[start : start + 20]
        assert len({p.document for p in pieces}) == len(pieces), "one piece of each document"
    assert store.pieces([(0, len(tokens))])[-1].stop > 0


def text_run(folder: Path) -> Path:
    texts = [{"text": f"document {i}, " * (1 + i % 4)} for i in range(200)]
    lines = folder / "texts.jsonl"
    lines.write_text("".join(json.dumps(text) + "\n" for text in texts))
    return save(data_config(folder, lines, vocab_size=257), folder)


def test_the_text_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = text_run(tmp_path)
    assert main(["--run", str(run), "--step", "2", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [entry["place"] for entry in entries] == list(range(8))
    for entry in entries:
        assert sum(p["stop"] - p["start"] for p in entry["pieces"]) == 17
        for piece, text in zip(entry["pieces"], entry["texts"], strict=True):
            number = piece["document"]
            whole = f"document {number}, " * (1 + number % 4)
            assert whole[piece["start"] : piece["stop"]] == text, "the end of document is no text"
    assert main(["--run", str(run), "--step", "2"]) == 0
    shown = capsys.readouterr().out
    first = entries[0]["pieces"][0]
    assert shown.startswith(f"step 2 of {run}: 8 samples of 16 tokens and a label\n0: sample ")
    where = f"document {first['document']}, tokens {first['start']}-{first['stop'] - 1}: "
    assert f"{tmp_path}/texts.jsonl, {where}{entries[0]['texts'][0]!r}" in shown


def test_random_tokens_have_no_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save(data_config(tmp_path, mock_data=True), tmp_path)
    assert main(["--run", str(run), "--step", "1"]) == 0
    assert capsys.readouterr().out.count("random tokens") == 8


@pytest.mark.parametrize("step", ["0", "11", "-3"])
def test_a_step_that_the_run_does_not_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], step: str
) -> None:
    assert main(["--run", str(text_run(tmp_path)), "--step", step]) == 2
    assert f"--step {step}: the run has the steps 1 to 10" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not valid JSON"),
        ("[]", "must hold names and values"),
        ("{}", "is not the saved configuration of a run"),
        ('{"derived": [], "train": {"stepz": 3}}', "no field 'stepz'"),
        ('{"derived": [], "train": {"steps": "x"}}', "steps = x: expected a whole number"),
    ],
)
def test_a_folder_that_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, part: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert main(["--run", str(tmp_path), "--step", "1"]) == 2
    found = capsys.readouterr().err
    assert part in found and f"{tmp_path}/config.json" in found


def test_data_that_is_gone_is_named(tmp_path: Path) -> None:
    config = data_config(tmp_path, tmp_path / "gone.txt")
    with pytest.raises(ConfigError, match="there is no file") as error:
        ledger(config, 1, None)
    assert len(error.value.violations) == 1


def test_data_of_another_folder_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(tmp_path / "a", 1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    config = data_config(tmp_path, "a")
    assert ledger(config, 1, None)
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="go where the run was started"):
        ledger(config, 1, None)


# The data may have changed since


def changed(capsys: pytest.CaptureFixture[str], run: Path) -> list[str]:
    """Sentences of the refusal."""
    assert main(["--run", str(run), "--step", "1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    return [lines[0].removeprefix("megalite: ")] if len(lines) == 1 else [x[4:] for x in lines[1:]]


def test_data_that_was_changed_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [write_dataset(tmp_path / name, seed) for seed, name in enumerate("abc")]
    config = data_config(
        tmp_path, train_data_path=(str(sets[0]), str(sets[1])), valid_data_path=(str(sets[2]),)
    )
    run = save(config, tmp_path)
    assert main(["--run", str(run), "--step", "1"]) == 0
    record = json.loads((run / "data.json").read_text())
    capsys.readouterr()
    write_dataset(sets[1], 7, 90)
    write_dataset(sets[2], 8)
    first, second = changed(capsys, run)
    was = record["train"][1]
    assert was["name"] == str(sets[1]) and was["documents"] == 100
    assert first.startswith(
        f"{sets[1]} is not what the run was trained on: fingerprint {was['fingerprint']} "
        f"(100 documents, {was['tokens']:,} tokens) expected, found "
    )
    assert first.endswith(" tokens): restore it") and "(90 documents, " in first
    assert second.startswith(f"{sets[2]} is not what the run was trained on")


def test_a_text_that_was_changed_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = text_run(tmp_path)
    path = tmp_path / "texts.jsonl"
    content = path.read_text()
    path.write_text(content.replace("document 17,", "document 71,"))
    (sentence,) = changed(capsys, run)
    assert sentence.startswith(f"{path} is not what the run was trained on")
    path.write_text(content)
    assert main(["--run", str(run), "--step", "1"]) == 0, "only its time has changed"


def test_another_tokenizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = text_run(tmp_path)
    record = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps(record | {"tokenizer": "sp-1"}))
    (sentence,) = changed(capsys, run)
    assert sentence == (
        "the run was trained with the tokenizer sp-1, its files now give byte-257: restore them"
    )


def test_a_run_of_before_the_record_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = text_run(tmp_path)
    (run / "data.json").unlink()
    assert main(["--run", str(run), "--step", "1", "--json"]) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)) == 8
    assert captured.err.startswith(f"note: {run} has no data.json, ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"tokenizer": "a", "train": [1], "valid": []}',
        "[" * 100_000,
        '{"tokenizer": 1, "train": [], "valid": [], "test": []}',
        '{"tokenizer": "a", "train": 1, "valid": [], "test": []}',
        '{"tokenizer": "a", "train": [], "valid": [], "test": [{"path": "a"}]}',
        '{"tokenizer": "a", "valid": [], "test": [],'
        ' "train": [{"name": "a", "fingerprint": "b", "documents": 1, "tokens": "c"}]}',
    ],
)
def test_a_damaged_record_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    run = text_run(tmp_path)
    (run / "data.json").write_text(content)
    (sentence,) = changed(capsys, run)
    assert sentence.startswith(f"{run}/data.json is damaged: ")
    assert sentence.endswith(": restore it, or remove it to go without this check")
    assert not any(word in sentence for word in ("object", "argument", "__init__", "indices"))


def test_the_command_imports_no_torch(tmp_path: Path) -> None:
    run = text_run(tmp_path)
    code = (
        "import sys; from megalite.data.__main__ import main; "
        f"code = main(['--run', {str(run)!r}, '--step', '1']); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "8 samples" in done.stdout
