"""A run that hangs says within its limit which rank keeps the others waiting, and in what."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from hangs import HANGS
from test_faults import processes_of_session, wait_until_session_is_empty

SCRIPT = Path(__file__).parent / "hangs.py"
SAMPLE = ("missing send", "asleep in forward", "exits early", "never starts")


def check(name: str, folder: Path, *launcher: str) -> None:
    process = subprocess.Popen(
        [sys.executable, *launcher, str(SCRIPT), name, str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    started = time.monotonic()
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line.rstrip())
        words = HANGS[name].words
        if line[:1] != " " and all(word in line for word in words):
            break
    # Launch 10 s at most, first steps, the limits of 8 s and 4 s, 3 s to see who is silent.
    assert time.monotonic() - started < 30, "\n".join(lines)
    lines += process.communicate(timeout=60)[1].splitlines()
    assert all(word in "\n".join(lines) for word in HANGS[name].words), "\n".join(lines)
    assert process.returncode == (1 if launcher else 5)
    assert launcher or "Traceback" not in "\n".join(lines), "torchrun adds one of its own"
    assert sum(line.startswith("  rank ") for line in lines) == 4, "one table of all ranks"
    wait_until_session_is_empty(process.pid)
    assert not processes_of_session(process.pid)


@pytest.mark.parametrize("name", SAMPLE)
def test_hang_sample(tmp_path: Path, name: str) -> None:
    check(name, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("name", HANGS)
def test_hang(tmp_path: Path, name: str) -> None:
    check(name, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("name", ["asleep in forward", "missing send"])
def test_hang_under_torchrun(tmp_path: Path, name: str) -> None:
    check(name, tmp_path, "-m", "torch.distributed.run", "--nproc-per-node", "4")
