"""Stopping and failing: no orphan, no noise, the culprit named, and at once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import SMALL, launch, pretrain_command

JOBS = Path(__file__).parent / "jobs.py"


def start(job: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(JOBS), job],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def read_pids(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    pids: list[int] = []
    while len(pids) < 4:
        line = process.stdout.readline()
        assert line, "the ranks never started"
        pids += [int(pid) for pid in re.findall(r"pid (\d+)", line)]
    return pids


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_until_gone(pids: list[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, f"left running: {[p for p in pids if alive(p)]}"
        time.sleep(0.05)


def processes_of_session(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getsid(int(entry.name)) == session:
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if alive(pid)]


def wait_until_session_is_empty(session: int) -> None:
    """Helpers of multiprocessing end by themselves, a moment after the processes they serve."""
    deadline = time.monotonic() + 5
    while left := processes_of_session(session):
        assert time.monotonic() < deadline, f"left running: {left}"
        time.sleep(0.05)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_ranks_quietly(stop: signal.Signals) -> None:
    process = start("waits")
    pids = read_pids(process)
    process.send_signal(stop)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 128 + stop
    assert stderr == f"megalite: stopped by {stop.name}\n"
    wait_until_gone(pids, 1)
    wait_until_session_is_empty(process.pid)


def test_ctrl_c_in_a_terminal_reaches_every_process_of_the_group() -> None:
    process = start("waits")
    pids = read_pids(process)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode in (130, 1)
    assert "Traceback" not in stderr
    wait_until_gone(pids, 1)
    wait_until_session_is_empty(process.pid)


def test_no_orphan_when_the_launcher_is_killed() -> None:
    with start("waits") as process:
        pids = read_pids(process)
        process.kill()
        process.wait()
        wait_until_gone(pids, 5)
    wait_until_session_is_empty(process.pid)


def test_a_rank_that_raises_is_named_once_and_ends_the_job_at_once() -> None:
    started = time.monotonic()
    result = launch([sys.executable, str(JOBS), "fails"])
    assert result.returncode == 1
    assert result.stderr.count("Traceback") == 1
    assert "megalite: rank 2 of tp 2 x pp 2 x dp 1 failed:" in result.stderr
    assert result.stderr.rstrip().endswith("ZeroDivisionError: planted on rank 2")
    assert time.monotonic() - started < 30


def test_a_rank_that_is_killed_is_named() -> None:
    result = launch([sys.executable, str(JOBS), "killed"])
    assert result.returncode == 1
    first, second, *table = result.stderr.splitlines()
    assert first == "megalite: rank 1 was killed by SIGKILL; all are stopped"
    assert second == "last heard of the ranks:"
    assert [line.split(":")[0] for line in table] == [f"  rank {rank}" for rank in range(4)]


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ("no_device", "AssertionError: choose_device counted the GPUs"),
        ("cannot_arrive", "LookupError: planted before the rank's own code"),
        ("leaves_early", "megalite: rank 1 ended with exit code 7"),
    ],
)
def test_no_rank_ends_without_a_word(job: str, words: str) -> None:
    result = launch([sys.executable, str(JOBS), job], env={"CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 1
    assert words in result.stderr


@pytest.mark.parametrize("delay_s", [1.0, 2.0, 3.0, 4.0])
def test_ctrl_c_while_ranks_are_starting_is_quiet(tmp_path: Path, delay_s: float) -> None:
    process = subprocess.Popen(
        pretrain_command("--tp", "2", "--pp", "2", "--device", "cpu", "--runs", str(tmp_path)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    time.sleep(delay_s)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert stderr.strip() == "megalite: stopped by SIGINT"
    wait_until_session_is_empty(process.pid)


def test_one_rank_stops_quietly_too(tmp_path: Path) -> None:
    command = pretrain_command(*SMALL, "--steps", "100000", "--runs", str(tmp_path))
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    while "step 3" not in process.stdout.readline().replace("  ", ""):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert stderr.strip() == "megalite: stopped by SIGINT"


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    return launch(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", *command]
    )


def test_under_torchrun_a_rank_that_raises_is_named_once() -> None:
    result = torchrun(str(JOBS), "fails")
    assert result.returncode == 1
    assert result.stderr.count("megalite: rank 2 of tp 2 x pp 2 x dp 1 failed:") == 1
    assert result.stderr.count("ZeroDivisionError: planted on rank 2") == 1
    assert "Connection closed by peer" not in result.stderr


def test_under_torchrun_a_problem_of_one_rank_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("rank 0 cannot make its folder in a file")
    flags = [*SMALL, "--dp", "4", "--device", "cpu", "--runs", str(tmp_path / "file")]
    result = torchrun("-m", "megalite.pretrain", *flags)
    assert result.returncode == 1, "torchrun's own code"
    ours = [line for line in result.stderr.splitlines() if line.startswith("megalite:")]
    assert len(ours) == 1
    assert f"--runs {tmp_path / 'file'}" in ours[0]
    assert ours[0].endswith("(rank 0)")
