"""A run that hangs says within its limit which rank keeps the others waiting, and in what."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hangs import HANGS
from pool import free_port
from runs import launch
from test_faults import processes_of_session, wait_until_session_is_empty

SCRIPT = Path(__file__).parent / "hangs.py"


def check(name: str, folder: Path, *launcher: str) -> None:
    """Start a run that hangs; what it says, how it ends, and that nothing is left of it."""
    with subprocess.Popen(
        [sys.executable, *launcher, str(SCRIPT), name, str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        lines = read_until_named(process, HANGS[name].words)
    told = "\n".join(lines)
    assert named(lines, HANGS[name].words), told
    assert process.returncode == (1 if launcher else 5), told
    assert launcher or "Traceback" not in told, "torchrun adds one of its own"
    assert sum(bool(re.match(r"  rank \d+: ", line)) for line in lines) == 4, told
    wait_until_session_is_empty(process.pid)
    assert not processes_of_session(process.pid)


def named(lines: list[str], words: tuple[str, ...]) -> bool:
    """Whether one sentence holds all of the words; the table is indented."""
    return any(all(word in line for word in words) for line in lines if line[:1] != " ")


def read_until_named(process: subprocess.Popen[str], words: tuple[str, ...]) -> list[str]:
    """All that the process says; fails if the words come too late."""
    started = time.monotonic()
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line.rstrip())
        if named(lines[-1:], words):
            break
    seconds = time.monotonic() - started
    lines += process.communicate(timeout=60)[1].splitlines()
    # Launch 10 s at most, first steps, the limits of 15 s or 4 s, 3 s to see who is silent.
    assert seconds < 40, "\n".join(lines)
    return lines


def test_what_is_only_slow_goes_on(tmp_path: Path) -> None:
    result = launch([sys.executable, str(SCRIPT), "slow", str(tmp_path)])
    assert (result.returncode, result.stderr) == (0, "")


def test_a_hang_of_ranks_started_by_hand(tmp_path: Path) -> None:
    """Nobody stops the others; the store goes with rank 0. `faults/test_processes.py` has a hang
    of ranks that a launcher started."""
    world = {"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(SCRIPT), "asleep in forward", str(tmp_path)]
    with ThreadPoolExecutor(4) as ranks:
        environments = [{**world, "RANK": str(rank)} for rank in range(4)]
        results = list(ranks.map(lambda env: launch(command, env=env, timeout=60), environments))
    assert [result.returncode for result in results] == [5] * 4
    told = [line for result in results for line in result.stderr.splitlines()]
    (sentence,) = [line for line in told if line.startswith("rank 1 never arrived")]
    assert "step 3, stage 0, micro-batch 0, forward" in sentence
    assert sum(line.startswith("megalite: ") for line in told) == 1


@pytest.mark.full
@pytest.mark.parametrize("name", HANGS)
def test_hang(tmp_path: Path, name: str) -> None:
    check(name, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("name", ["asleep in forward", "missing send"])
def test_hang_under_torchrun(tmp_path: Path, name: str) -> None:
    check(name, tmp_path, "-m", "torch.distributed.run", "--nproc-per-node", "4")
