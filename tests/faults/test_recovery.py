"""Runs that die, are stopped or find a disk full, and go on: nothing is lost, no bit differs."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from runs import SMALL, launch, pretrain_command

from megalite.checkpoint.directory import Directory
from megalite.checkpoint.reader import Checkpoint
from megalite.events import read_events
from megalite.exit_codes import ExitCode

STEPS = 12
RUN = [*SMALL, "--device", "cpu", "--steps", str(STEPS), "--save-interval", "2"]
RUN += ["--hidden-dropout", "0.1", "--name", "run"]


def command(folder: Path, *flags: str) -> list[str]:
    return pretrain_command(*RUN, *flags, "--runs", str(folder), "--save", str(folder / "ck"))


def run(folder: Path, fault: str, *flags: str) -> subprocess.CompletedProcess[str]:
    env = {"MEGALITE_FAULT": fault, "OMP_NUM_THREADS": "1"}
    return launch(command(folder, *flags), env=env, timeout=240)


def final(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(Directory(folder / "ck").folder(step))
    assert not checkpoint.damages()
    return {name: checkpoint.whole(name) for name in checkpoint.tensors}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The end of a run of two data ranks to which nothing happens."""
    folder = tmp_path_factory.mktemp("calm")
    result = run(folder, "", "--dp", "2")
    assert result.returncode == 0, result.stderr
    return final(folder)


def test_restarts_lose_one_save_interval_at_most(
    tmp_path: Path, calm: dict[str, torch.Tensor]
) -> None:
    """Cases 1 and 3: rank 1 dies in a step, and rank 0 with a save under way."""
    fault = "kill:rank=1,step=7"
    result = run(tmp_path, fault, "--dp", "2", "--max-restarts", "2", "--no-resume")
    assert result.returncode == 0, result.stderr
    assert same(final(tmp_path), calm)
    starts = [e for e in read_events(tmp_path / "ck/events.jsonl") if e["event"] == "start"]
    assert [e["attempt"] for e in starts] == [0, 1]
    assert 4 <= starts[1]["step"] <= 6, "killed in step 7, with a checkpoint every two steps"
    lost = re.search(r"; (\d+) steps? lost, 1 restart", result.stdout)
    assert lost and int(lost[1]) <= 2


@pytest.mark.parametrize(
    ("fault", "newest"),
    [
        ("kill:at=half-shard,step=4", 2),
        pytest.param("kill:at=before-shard,step=4", 2, marks=pytest.mark.full),
        pytest.param("kill:at=before-manifest,step=4", 2, marks=pytest.mark.full),
        pytest.param("kill:at=before-rename,step=4", 2, marks=pytest.mark.full),
        pytest.param("kill:at=after-rename,step=4", 4, marks=pytest.mark.full),
        pytest.param("kill:rank=1,at=half-shard,step=4", 2, marks=pytest.mark.full),
    ],
)
def test_killed_in_a_save(
    tmp_path: Path, calm: dict[str, torch.Tensor], fault: str, newest: int
) -> None:
    """Case 2, and 3, as the save goes on beside training."""
    result = run(tmp_path, fault, "--dp", "2")
    assert result.returncode == ExitCode.INTERNAL, result.stderr
    assert Directory(tmp_path / "ck").steps()[0] == newest
    result = run(tmp_path, "", "--dp", "2")
    assert result.returncode == 0, result.stderr
    assert f"step-{newest:08d}: step {newest}" in result.stdout
    assert not list((tmp_path / "ck").glob("*.tmp-*")), "swept"
    assert same(final(tmp_path), calm)


def stopped(folder: Path, number: int, *flags: str) -> subprocess.CompletedProcess[str]:
    """A run that gets a signal after its fifth step's line."""
    with subprocess.Popen(
        command(folder, *flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MEGALITE_FAULT": "slow:step=1,seconds=0.3"},
    ) as process:
        assert process.stdout is not None
        told = ""
        while not re.search(r"^step +5/", told, re.M):
            line = process.stdout.readline()
            assert line, (told, process.stderr and process.stderr.read())
            told += line
        process.send_signal(number)
        rest, errors = process.communicate(timeout=120)
        return subprocess.CompletedProcess((), process.returncode, told + rest, errors)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.full)]
)
def test_asked_to_stop_it_saves_and_goes_on(
    tmp_path: Path, calm: dict[str, torch.Tensor], number: int
) -> None:
    """Case 5, with a save."""
    result = stopped(tmp_path, number, "--dp", "2")
    assert result.returncode == ExitCode.STOPPED, result.stderr
    step = Directory(tmp_path / "ck").steps()[0]
    assert 5 <= step <= 8
    assert "the same command goes on from it" in result.stdout
    result = run(tmp_path, "", "--dp", "2")
    assert f"step {step}," in result.stdout
    assert same(final(tmp_path), calm)


@pytest.mark.full
def test_a_full_disk_costs_a_save_and_no_more(
    tmp_path: Path, calm: dict[str, torch.Tensor]
) -> None:
    """Case 13."""
    result = run(tmp_path, "enospc:rank=1,at=half-shard,step=6", "--dp", "2")
    assert result.returncode == 0, result.stderr
    told = "*** no checkpoint of step 6: rank 1: No space left on device"
    assert told in result.stdout
    assert Directory(tmp_path / "ck").steps() == [12, 10, 8, 4, 2]
    assert not list((tmp_path / "ck").glob("*.tmp-*"))
    assert same(final(tmp_path), calm)
    kinds = [e["event"] for e in read_events(tmp_path / "ck/events.jsonl")]
    assert kinds.count("save") == 5 and kinds.count("save failed") == 1


@pytest.mark.full
def test_a_disk_that_stays_full_ends_the_run(tmp_path: Path) -> None:
    result = run(tmp_path, "enospc:at=before-manifest", "--dp", "2")
    assert result.returncode not in (0, ExitCode.STOPPED)
    assert "3 saves in a row failed: No space left on device" in result.stderr
    assert not Directory(tmp_path / "ck").steps()


def test_a_folder_that_cannot_be_written_is_found_before_the_first_step(tmp_path: Path) -> None:
    """Case 14."""
    (tmp_path / "ck").write_text("in the way")
    result = run(tmp_path, "", "--dp", "2")
    assert result.returncode == ExitCode.BAD_INPUT
    assert f"--save {tmp_path / 'ck'}: {tmp_path / 'ck'} is no folder" in result.stderr
    (tmp_path / "ck").unlink()
    (tmp_path / "file").write_text("in the way")
    words = pretrain_command(*RUN, "--runs", str(tmp_path), "--save", str(tmp_path / "file/ck"))
    result = launch(words, timeout=120)
    assert result.returncode == ExitCode.BAD_INPUT, result.stderr
    assert "step " not in result.stdout and "file/ck" in result.stderr


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    """Case 22."""
    slow = {**os.environ, "OMP_NUM_THREADS": "1", "MEGALITE_FAULT": "slow:step=1,seconds=1"}
    with subprocess.Popen(
        command(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=slow
    ) as first:
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "ck/lock").exists():
                assert time.monotonic() < deadline
                time.sleep(0.1)
            words = [w if w != "run" else "other" for w in command(tmp_path)]
            result = launch(words, timeout=120)
            assert result.returncode == ExitCode.BAD_INPUT, result.stdout
            assert f"the run run writes there, process {first.pid}" in result.stderr
        finally:
            first.kill()
            first.wait()
    result = run(tmp_path, "")
    assert result.returncode == 0, "a dead run's lock is nobody's"


@pytest.mark.parametrize("kills", [2, pytest.param(8, marks=pytest.mark.full)])
def test_chaos(tmp_path: Path, calm: dict[str, torch.Tensor], kills: int) -> None:
    """Random ranks die in random steps and at random points of saves, again and again, with and
    without a restart by the launcher; the end has the calm run's bits."""
    rng = random.Random(kills)
    points = ["half-shard", "before-manifest", "before-rename", "after-rename"]
    died = 0
    for _ in range(kills):
        done = max(Directory(tmp_path / "ck").steps(), default=0)
        if done >= STEPS - 1:
            break
        rank, step = rng.randrange(2), rng.randint(done + 1, min(STEPS, done + 4))
        fault = f"kill:rank={rank},step={step}"
        if rng.random() < 0.5:
            rank, even = 0, step + step % 2
            fault = f"kill:rank={rank},at={rng.choice(points)},step={even}"
        result = run(tmp_path, fault, "--dp", "2")
        died += result.returncode == ExitCode.INTERNAL
        assert result.returncode in (0, ExitCode.INTERNAL), result.stderr
    result = run(tmp_path, "", "--dp", "2", "--max-restarts", "1")
    assert result.returncode == 0, result.stderr
    assert died >= min(2, kills)
    assert same(final(tmp_path), calm)


@pytest.mark.full
def test_one_bit_on_the_disk(tmp_path: Path, calm: dict[str, torch.Tensor]) -> None:
    """Cases 15 to 17: named, passed over, and put aside when its step is reached again."""
    run(tmp_path, "", "--dp", "2")
    path = Directory(tmp_path / "ck").folder(STEPS) / "rank-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 16
    path.write_bytes(data)
    result = run(tmp_path, "", "--dp", "2")
    assert result.returncode == 0, result.stderr
    assert re.search(r"passed over: .*rank-00001.safetensors: bytes .* of \S+", result.stdout)
    assert "step-00000010: step 10" in result.stdout
    assert same(final(tmp_path), calm)
    # Nothing of it is lost either.
    assert list((tmp_path / "ck").glob(f"step-{STEPS:08d}.damaged-*"))
