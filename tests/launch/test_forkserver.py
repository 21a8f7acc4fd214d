"""What is killed when the ranks are stopped: also a rank that is only being forked."""

from __future__ import annotations

import sys

import pytest
from runs import launch

SCRIPT = r"""
import multiprocessing, os, sys, threading, time
from megalite.parallel import forkserver

class Slow:
    "Is found gone by a process that is still being told what to do."
    def __reduce__(self):
        return open, (NAME,)

def work(_):
    time.sleep(100)

def is_running(pid):
    "A process that has ended may wait for its new parent to ask for its exit status."
    try:
        return "State:\tZ" not in open(f"/proc/{pid}/status").read()
    except OSError:
        return False

NAME = sys.argv[1]

if __name__ == "__main__":
    context = multiprocessing.get_context(forkserver.start_method())
    os.mkfifo(NAME)
    # Opening a pipe waits for a writer: the process stays in the middle of its start.
    ranks = [context.Process(target=work, args=(arg,)) for arg in (Slow(), 1, 2)]
    for rank in ranks:
        rank.start()
    if sys.argv[2] == "unknown":
        # As it is while `start` has not returned.
        multiprocessing.process._children.discard(ranks[0])
    time.sleep(1)
    pids = [rank.pid for rank in ranks]
    forkserver.kill_all()
    os.unlink(NAME)
    time.sleep(0.5)
    print([pid for pid in pids if is_running(pid)])
"""


@pytest.mark.parametrize("known", ["known", "unknown"])
def test_nothing_is_left_and_nothing_is_said(tmp_path, known: str) -> None:
    script = tmp_path / "start.py"
    script.write_text(SCRIPT)
    result = launch([sys.executable, str(script), str(tmp_path / "pipe"), known], timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "[]\n", "")
