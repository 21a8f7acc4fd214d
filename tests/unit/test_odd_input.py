"""Input that people really give by accident: one message, never a traceback or endless work."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from commands import run, violations, word_violations

from megalite import closing, pretrain
from megalite.check import check
from megalite.config import Config, resolve
from megalite.data import source
from megalite.errors import ConfigError
from megalite.parallel.devices import _quota
from megalite.parallel.launch import _signals_to_handle
from megalite.report import timeline


def test_an_empty_variable_is_no_corpus() -> None:
    assert word_violations("--data", "") == ["--data is given an empty value"]
    assert word_violations("--name=") == ["--name is given an empty value"]


@pytest.mark.parametrize("name", ["corpus.arrow", "corpus.tar.gz", "corpus.txt.zst"])
def test_files_that_are_no_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PAR1")
    (sentence,) = violations("--data", str(tmp_path / name))
    assert sentence.endswith("is not text: unpack it to a .txt or .jsonl file")


def test_files_that_need_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalite.reading.inputs.find_spec", lambda name: None)
    for name, need in (("a.jsonl.zst", "zstd files need the package zstandard"),
                       ("a.parquet", "parquet files need the package pyarrow")):  # fmt: skip
        (tmp_path / name).write_bytes(b"x")
        (sentence,) = violations("--data", str(tmp_path / name))
        assert sentence == f"--data {tmp_path}/{name}: {need}: pip install 'megalite[data]'"


def test_a_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(source.Path, "iterdir", refuse)
    (sentence,) = violations("--data", str(tmp_path / "typo.txt"))
    assert sentence.endswith("typo.txt")


@pytest.mark.parametrize("number", ["1" + "0" * 400, "1" + "0" * 5000])
@pytest.mark.parametrize("kind", ["toml", "json"])
def test_numbers_of_hundreds_of_digits(tmp_path: Path, number: str, kind: str) -> None:
    file = tmp_path / f"run.{kind}"
    file.write_text(f"lr = {number}" if kind == "toml" else f'{{"lr": {number}}}')
    assert len(violations("--config", str(file))) == 1
    assert violations("--split", f"{'9' * 400},1")[0].startswith("--split 999")


def test_huge_numbers_take_no_time() -> None:
    started = time.monotonic()
    (sentence,) = violations(
        "--tp",
        "3",
        "--num-attention-heads",
        "3",
        "--hidden-size",
        "192",
        "--seq-length",
        "129",
        "--ffn-hidden-size",
        "1000000000",
    )
    assert sentence.endswith("; try 1, 2, 4, 5")
    assert "; drawn: " in timeline(run("--pp", "4", "--global-batch-size", "32000000"))
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("count", [3, 79, 80, 81, 200])
def test_the_idle_share_is_that_of_all_micro_batches(schedule: str, count: int) -> None:
    flags = f"--pp 4 --micro-batch-size 1 --global-batch-size {count} --schedule {schedule}"
    idle = float(timeline(run(*flags.split())).split("micro-batches, ")[1].split("%")[0])
    assert idle == pytest.approx(100 * 3 / (count + 3), abs=0.06)


def test_runs_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to(tmp_path / "not mounted")
    for name in ("", "x"):
        config = resolve(Config().replace(runs=str(tmp_path / "runs"), name=name))
        with pytest.raises(ConfigError, match=r"--runs .*runs: .*runs: "):
            pretrain._claim_folder(config)


def test_corpus_name_and_device_are_judged_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "runs/mine").mkdir(parents=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    flags = ["--data", str(tmp_path / "short.txt"), "--runs", str(tmp_path / "runs")]
    assert pretrain.main([*flags, "--name", "mine", "--device", "cuda"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "megalite: 3 problems:"
    for line, word in zip(lines[1:], ("--device cuda", "--name mine", "short.txt"), strict=True):
        assert word in line


def test_a_dry_run_of_a_given_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain.main(["--dry-run", "--device", "cpu", "--tp", "2"]) == 0
    told = capsys.readouterr().out
    assert "cpu, as asked" in told and "fp32" in told and "bf16" not in told


@pytest.mark.parametrize(
    ("text", "cores"), [("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1)]
)
def test_a_container_s_quota(tmp_path: Path, text: str, cores: int) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(text)
    assert _quota(file) == cores
    file.write_text("max 100000")
    assert _quota(file) > 10**6 and _quota(tmp_path / "none") > 10**6


def test_a_small_batch_is_told_with_single_spaces(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--micro-batch-size", "2", "--global-batch-size", "4", "--seq-length", "32"]
    assert pretrain.main(["--dry-run", "--device", "cpu", *words]) == 0
    assert "on 1 data rank; 128 tokens\n" in capsys.readouterr().out


def test_nohup_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    ignored = {signal.SIGHUP}
    monkeypatch.setattr(
        signal, "getsignal", lambda stop: signal.SIG_IGN if stop in ignored else signal.SIG_DFL
    )
    assert _signals_to_handle() == ["SIGQUIT"]
    ignored.clear()
    assert _signals_to_handle() == ["SIGHUP", "SIGQUIT"]


def test_limits_of_steps_stay_below_that_of_a_collective() -> None:
    (sentence,) = violations("--tp", "2", "--step-timeout", "900")
    assert sentence.startswith("--step-timeout 900 is longer than a collective waits, 600 s")
    check(run("--tp", "2", "--step-timeout", "900", "--distributed-timeout-minutes", "20"))


def test_the_command_to_type_next(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(closing.sys, "executable", str(tmp_path / ".venv/bin/python"))
    monkeypatch.chdir(tmp_path)
    assert closing._python() == os.path.join(".venv", "bin", "python")
    monkeypatch.chdir("/")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / ".venv/bin"))
    assert closing._python() == "python"
