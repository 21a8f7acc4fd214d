"""A signal is never lost, and the exit code after it is the program's own."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from runs import launch

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
