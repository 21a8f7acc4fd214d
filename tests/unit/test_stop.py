"""A signal is never lost, and the exit code after it is the program's own."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from runs import launch

from megalite.parallel.stop import AGAIN_S, StopRequest

PATH = os.pathsep.join(filter(None, sys.path))

SWALLOWING = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.{stop})
    time.sleep(0.1)
except BaseException:
    print("swallowed")
print("imported")
"""

PROGRAM = """
import os, signal, time
from megalite.program import end

def stop():
    os.kill(os.getpid(), signal.{stop})
    time.sleep(0.1)

def in_an_import():
    import swallowing
    time.sleep(100)

def in_a_text():
    exec("stop()")

class Object:
    def __del__(self):
        stop()
        print("deleted")

def in_a_destructor():
    Object()
    time.sleep(100)

def swallowed():
    try:
        stop()
    except BaseException:
        print("swallowed")
    time.sleep(100)

end({case})
"""


@pytest.mark.parametrize("stop", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(
    ("case", "stdout"),
    [
        ("in_an_import", "imported\n"),
        ("in_a_text", ""),
        ("in_a_destructor", "deleted\n"),
        pytest.param("swallowed", "swallowed\n", marks=pytest.mark.full),
    ],
)
def test_a_signal_is_never_lost(tmp_path: Path, case: str, stdout: str, stop: str) -> None:
    (tmp_path / "swallowing.py").write_text(SWALLOWING.format(stop=stop))
    (tmp_path / "program.py").write_text(PROGRAM.format(case=case, stop=stop))
    # As a module: only then the interpreter may end by the signal after all.
    path = f"{tmp_path}{os.pathsep}{PATH}"
    result = launch([sys.executable, "-m", "program"], env={"PYTHONPATH": path}, timeout=60)
    assert result.stderr == f"\nmegalite: stopped by {stop}\n"
    assert result.stdout == stdout
    assert result.returncode == 128 + signal.Signals[stop]


def test_signals_that_a_parent_told_us_to_ignore_stay_ignored(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import os, signal\n"
        "from megalite.program import end\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "end(lambda: os.kill(os.getpid(), signal.SIGINT) or 7)\n"
    )
    result = launch(
        [sys.executable, str(tmp_path / "program.py")], env={"PYTHONPATH": PATH}, timeout=60
    )
    assert (result.returncode, result.stderr) == (7, "")


def sent(stop: signal.Signals) -> None:
    os.kill(os.getpid(), stop)
    time.sleep(0.01)


def test_while_a_run_listens_a_signal_is_a_request() -> None:
    request, before = StopRequest(), signal.getsignal(signal.SIGTERM)
    with request.listening():
        assert (request.by, request.is_heeded, request.is_terminated()) == (None, True, False)
        sent(signal.SIGUSR1)
        assert request.by is signal.SIGUSR1 and not request.is_terminated()
        sent(signal.SIGTERM)
        assert request.by is signal.SIGUSR1, "the first one"
    assert not request.is_heeded and signal.getsignal(signal.SIGTERM) is before
    assert request.is_terminated(), "also afterwards"


def test_the_second_signal_does_what_it_did_before() -> None:
    class StoppedError(Exception):
        pass

    def stop(*_: object) -> None:
        raise StoppedError

    before = signal.signal(signal.SIGTERM, stop)
    request = StopRequest()
    try:
        with request.listening():
            sent(signal.SIGTERM)
            sent(signal.SIGTERM)  # passed on by a launcher, a moment later
            request._since -= AGAIN_S
            with pytest.raises(StoppedError):
                sent(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_that_a_parent_ignores_asks_nobody() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    request = StopRequest()
    try:
        with request.listening():
            sent(signal.SIGINT)
            assert request.by is None
    finally:
        signal.signal(signal.SIGINT, before)
