"""Stopping and failing: no orphan, no noise, the culprit named, and at once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import SMALL, launch, pretrain_command

from megalite.exit_codes import ExitCode

JOBS = Path(__file__).parent / "jobs.py"

PATIENCE_S = 60.0
"""For what takes a second on a machine with nothing else to do; what hangs takes minutes."""


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


def wait_until(done: Callable[[], bool], problem: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < deadline, problem()
        time.sleep(0.02)


def wait_until_gone(pids: list[int]) -> None:
    wait_until(
        lambda: not any(map(alive, pids)), lambda: f"left running: {[p for p in pids if alive(p)]}"
    )


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
    wait_until(
        lambda: not processes_of_session(session),
        lambda: f"left running: {processes_of_session(session)}",
    )


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_ranks_quietly(stop: signal.Signals) -> None:
    process = start("waits")
    pids = read_pids(process)
    process.send_signal(stop)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + stop
    assert stderr == f"megalite: stopped by {stop.name}\n"
    wait_until_gone(pids)
    wait_until_session_is_empty(process.pid)


def test_ctrl_c_in_a_terminal_reaches_every_process_of_the_group() -> None:
    process = start("waits")
    pids = read_pids(process)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert stderr == "megalite: stopped by SIGINT\n"
    wait_until_gone(pids)
    wait_until_session_is_empty(process.pid)


def test_no_orphan_when_the_launcher_is_killed() -> None:
    with start("waits") as process:
        pids = read_pids(process)
        process.kill()
        process.wait()
        wait_until_gone(pids)
    wait_until_session_is_empty(process.pid)


def test_a_rank_that_raises_is_named_once_and_ends_the_job_at_once() -> None:
    started = time.monotonic()
    result = launch([sys.executable, str(JOBS), "fails"])
    assert result.returncode == ExitCode.INTERNAL
    assert result.stderr.count("Traceback") == 1
    assert "megalite: rank 2 of tp 2 x pp 2 x dp 1 failed:" in result.stderr
    assert result.stderr.rstrip().endswith("ZeroDivisionError: planted on rank 2")
    assert time.monotonic() - started < PATIENCE_S


def test_a_rank_that_is_killed_is_named() -> None:
    result = launch([sys.executable, str(JOBS), "killed"])
    assert result.returncode == ExitCode.INTERNAL
    first, second, *table = result.stderr.splitlines()
    assert first == "megalite: rank 1 was killed by SIGKILL; all are stopped"
    assert second == "last heard of the ranks:"
    assert [line.split(":")[0] for line in table] == [f"  rank {rank}" for rank in range(4)]


@pytest.mark.parametrize(
    ("job", "words", "code"),
    [
        pytest.param(
            *("no_device", "AssertionError: choose_device counted the GPUs", ExitCode.INTERNAL),
            marks=pytest.mark.full,
        ),
        pytest.param(
            *("cannot_arrive", "LookupError: planted before the rank's own code", 1),
            marks=pytest.mark.full,
        ),
        ("leaves_early", "megalite: rank 1 ended with exit code 7", ExitCode.INTERNAL),
    ],
)
def test_no_rank_ends_without_a_word(job: str, words: str, code: int) -> None:
    result = launch([sys.executable, str(JOBS), job], env={"CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == code
    assert words in result.stderr


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def servers(pid: int) -> list[int]:
    """The process that a launcher forks its ranks from, once there is one."""
    return [
        child
        for child in children(pid)
        if b"multiprocessing.forkserver" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


STARTED: dict[str, Callable[[int], bool]] = {
    "torch": lambda pid: "libtorch" in Path(f"/proc/{pid}/maps").read_text(),
    "server": lambda pid: bool(servers(pid)),
    "ranks": lambda pid: any(map(children, servers(pid))),
}
"""How far a launcher has come, by its process; in this order."""


MOMENTS = [
    *(("torch", delay_s) for delay_s in (0.0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.6)),
    *(("server", delay_s) for delay_s in (0.0, 0.2, 0.5, 0.8, 1.1)),
    *(("ranks", delay_s) for delay_s in (0.0, 0.1, 0.2, 0.3, 0.5, 1.0)),
]


@pytest.mark.parametrize(
    ("stop", "started", "delay_s"),
    [
        ("SIGINT", "torch", 0.25),
        ("SIGTERM", "torch", 0.0),
        ("SIGINT", "server", 0.0),
        ("SIGTERM", "server", 0.0),
        ("SIGINT", "ranks", 0.5),
        *(
            pytest.param(stop, *moment, marks=pytest.mark.full)
            for stop in ("SIGINT", "SIGTERM")
            for moment in MOMENTS
        ),
    ],
)
def test_a_signal_while_ranks_are_starting_is_quiet(
    tmp_path: Path, stop: str, started: str, delay_s: float
) -> None:
    process = subprocess.Popen(
        pretrain_command("--tp", "2", "--pp", "2", "--device", "cpu", "--runs", str(tmp_path)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(
        lambda: STARTED[started](process.pid), lambda: f"it ended with {process.poll()} before"
    )
    time.sleep(delay_s)
    os.killpg(process.pid, signal.Signals[stop])
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + signal.Signals[stop]
    assert stderr.strip() == f"megalite: stopped by {stop}"
    wait_until_session_is_empty(process.pid)


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
