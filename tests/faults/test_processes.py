"""Ranks that die, hang, raise or are asked to stop, in runs as users start them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from runs import SMALL, launch, pretrain_command

from megalite.events import Event, read_events
from megalite.exit_codes import ExitCode

RUN = [*SMALL, "--device", "cpu", "--mock-data", "--no-save-weights", "--name", "run"]
ENDLESS = ("--steps", "100000", "--log-interval", "1")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
PATIENCE_S = 60.0


def run(folder: Path, fault: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = pretrain_command(*RUN, "--runs", str(folder), *flags)
    return launch(command, env={"MEGALITE_FAULT": fault, **ONE_THREAD}, timeout=120)


@contextmanager
def running(folder: Path, *flags: str, launcher: tuple[str, ...] = ()) -> Iterator[Any]:
    """An endless run that has begun its third step."""
    command = pretrain_command(*RUN, *ENDLESS, "--runs", str(folder), *flags)
    with subprocess.Popen(
        [command[0], *launcher, *command[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **ONE_THREAD},
    ) as process:
        try:
            assert process.stdout is not None
            while not re.match(r"step +2/", process.stdout.readline()):
                assert process.poll() is None
            yield process
        finally:
            process.kill()


def end(process: Any) -> tuple[str, str]:
    """What it still says; it leaves no process behind."""
    told = process.communicate(timeout=PATIENCE_S)
    deadline = time.monotonic() + PATIENCE_S
    while left := of_session(process.pid):
        assert time.monotonic() < deadline, f"left running: {left}"
        time.sleep(0.05)
    return told


def of_session(session: int) -> list[int]:
    """Processes of a session that are no zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, sid = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(sid) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def ranks_of(session: int) -> list[int]:
    """The ranks of our own launcher: forked from its server, they have connections and threads."""
    return [
        pid for pid in of_session(session) if len(list(Path(f"/proc/{pid}/task").iterdir())) > 4
    ]


def events(folder: Path, name: str = "") -> list[Event]:
    return [e for e in read_events(folder / "run/events.jsonl") if name in ("", e["event"])]


def test_a_killed_rank_is_named_and_all_start_again(tmp_path: Path) -> None:
    """Case 1; a fault fires in the first start alone. Ranks say five times a second where they are,
    so this one stays in its last step for long enough to have said it."""
    fault = "slow:rank=1,step=3,seconds=0.6;kill:rank=1,step=3"
    result = run(tmp_path, fault, "--tp", "2", "--max-restarts", "2")
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("megalite: ")]
    assert said[0] == "megalite: rank 1 was killed by SIGKILL; all are stopped"
    again = re.fullmatch(
        r"megalite: starting all ranks again after rank 1 was killed by SIGKILL \(restart 1 of 2, "
        r"([\d.]+) s after the failure was noticed\)",
        said[1],
    )
    assert again and len(said) == 2
    assert result.stderr.count("*** MEGALITE_FAULT") == 1
    assert [(e["event"], e["attempt"]) for e in events(tmp_path)] == [
        *(("start", 0), ("restart", 0), ("start", 1), ("steps", 1), ("end", 1))
    ]
    (restart,) = events(tmp_path, "restart")
    assert (restart["code"], restart["step"]) == (ExitCode.INTERNAL, 2)
    assert events(tmp_path, "start")[0]["packages"]["torch"]
    assert re.search(r"effective training time .*; 2 steps lost, 1 restart,", result.stdout)


def test_a_hang_is_explained_with_stacks_and_all_start_again(tmp_path: Path) -> None:
    """Case 8."""
    limits = ("--step-timeout", "4", "--max-restarts", "1")
    result = run(tmp_path, "hang:rank=1,step=4", "--pp", "2", *limits)
    assert result.returncode == 0, result.stderr
    told = result.stderr
    assert "more than the 4 s that it may take (--step-timeout)" in told
    assert "rank 1 never arrived: it is in step 4, reading samples; rank 0 waits for it" in told
    assert f"stacks of the ranks: {tmp_path}/run/stacks" in told
    stack = (tmp_path / "run/stacks/rank-1.txt").read_text()
    assert "in _strike" in stack and "in in_step" in stack
    assert (tmp_path / "run/stacks/rank-0.txt").exists()
    (restart,) = events(tmp_path, "restart")
    assert (restart["code"], restart["step"]) == (ExitCode.HUNG, 3)


@pytest.mark.parametrize(
    ("stop", "to"),
    [
        (signal.SIGTERM, "one rank"),
        *(
            pytest.param(stop, to, marks=pytest.mark.full)
            for stop, to in [
                (signal.SIGTERM, "launcher"),
                (signal.SIGINT, "group"),
                (signal.SIGUSR1, "launcher"),
                (signal.SIGTERM, "group"),
                (signal.SIGUSR1, "one rank"),
            ]
        ),
    ],
)
def test_asked_to_stop_all_ranks_do_after_the_same_step(
    tmp_path: Path, stop: signal.Signals, to: str
) -> None:
    """Cases 5 to 7: no rank is left behind in a collective, nothing is started again."""
    with running(tmp_path, "--tp", "2", "--pp", "2", "--max-restarts", "2") as process:
        asked = time.monotonic()
        match to:
            case "launcher":
                process.send_signal(stop)
            case "group":
                os.killpg(process.pid, stop)
            case "one rank":
                os.kill(ranks_of(process.pid)[-1], stop)
        stdout, stderr = end(process)
    assert process.returncode == ExitCode.STOPPED, stderr
    assert "Traceback" not in stderr
    (last,) = re.findall(r"stopped by .* after step (\d+) of 100000", stderr)
    shown = [int(step) for step in re.findall(r"^step +(\d+)/", stdout, re.MULTILINE)]
    assert shown[-1] == int(last)
    (stopped,) = events(tmp_path, "stop")
    assert (stopped["code"], stopped["step"]) == (ExitCode.STOPPED, int(last))
    if to != "one rank":
        assert stopped["why"] == stop.name
    assert len(events(tmp_path, "start")) == 1
    assert time.monotonic() - asked < PATIENCE_S


@pytest.mark.parametrize(
    "stop", [signal.SIGINT, *(pytest.param(s, marks=pytest.mark.full) for s in (signal.SIGTERM,))]
)
def test_one_rank_in_this_process_stops_in_order_too(tmp_path: Path, stop: signal.Signals) -> None:
    with running(tmp_path) as process:
        process.send_signal(stop)
        _, stderr = end(process)
    assert process.returncode == ExitCode.STOPPED
    assert re.fullmatch(rf"megalite: stopped by {stop.name} after step \d+ of 100000\n", stderr)


@pytest.mark.full
@pytest.mark.parametrize("flags", [(), ("--tp", "2")], ids=["alone", "tp 2"])
def test_the_second_signal_stops_at_once(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Case 7. A rank that is slow, so that the step under way lasts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGALITE_FAULT", "slow:step=4,seconds=100")
        with running(tmp_path, *flags) as process:
            process.send_signal(signal.SIGINT)
            time.sleep(1.5)
            assert process.poll() is None, "it waits for the step under way"
            process.send_signal(signal.SIGINT)
            _, stderr = end(process)
    assert process.returncode == 130
    assert stderr.rstrip().endswith("megalite: stopped by SIGINT")
    assert "Traceback" not in stderr


@pytest.mark.full
def test_under_torchrun_sigterm_stops_all_ranks_after_the_same_step(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    with running(tmp_path, "--tp", "2", launcher=torchrun) as process:
        process.send_signal(signal.SIGTERM)
        _, stderr = end(process)
    assert process.returncode == 1, "torchrun's own code"
    (stopped,) = events(tmp_path, "stop")
    assert (stopped["code"], stopped["why"]) == (ExitCode.STOPPED, "SIGTERM")
    assert re.search(r"stopped by SIGTERM after step \d+ of 100000", stderr)


@pytest.mark.full
def test_under_torchrun_a_killed_rank_leaves_nobody_waiting(tmp_path: Path) -> None:
    """torchrun sends SIGTERM to the others, which would wait for the end of a step otherwise."""
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    with running(tmp_path, "--tp", "2", launcher=torchrun) as process:
        began = time.monotonic()
        killed, left = map(int, children(process.pid))
        os.kill(killed, signal.SIGKILL)
        end(process)
    assert process.returncode == 1
    assert not Path(f"/proc/{left}").exists()
    assert time.monotonic() - began < 15.0


@pytest.mark.full
def test_an_exception_is_told_once_and_all_start_again(tmp_path: Path) -> None:
    """Case 10; and the fault that says always ends the run when no restart is left."""
    flags = ("--pp", "2", "--max-restarts", "1")
    result = run(tmp_path, "exc:rank=1,step=3,always", *flags)
    assert result.returncode == ExitCode.INTERNAL
    assert result.stderr.count("Traceback") == 2, "once a start"
    assert result.stderr.count("InjectedError: injected by MEGALITE_FAULT: rank 1 raises") == 2
    assert result.stderr.count("starting all ranks again after rank ") == 1
    (stopped,) = events(tmp_path, "stop")
    assert (stopped["attempt"], stopped["code"]) == (1, ExitCode.INTERNAL)


@pytest.mark.full
def test_one_rank_is_started_again_too(tmp_path: Path) -> None:
    result = run(tmp_path, "kill:step=2", "--max-restarts", "1")
    assert result.returncode == 0, result.stderr
    assert "rank 0 was killed by SIGKILL (restart 1 of 1" in result.stderr


@pytest.mark.full
@pytest.mark.parametrize("fault", ["kill:rank=1,step=3", "hang:rank=1,step=3"])
def test_how_long_a_failure_takes(tmp_path: Path, fault: str) -> None:
    """P5: what the launcher took to notice a dead rank; until a hang had ended all ranks."""
    limits = ("--step-timeout", "4") if fault.startswith("hang") else ()
    began = time.time()
    result = run(tmp_path, fault, "--tp", "2", *limits)
    (stopped,) = events(tmp_path, "stop")
    (start,) = events(tmp_path, "start")
    steps_s = stopped["time"] - start["time"]
    print(f"{fault}: {steps_s:.1f} s from the start of the ranks to the end of all")
    assert result.returncode == (ExitCode.HUNG if limits else ExitCode.INTERNAL)
    # Three steps of some tenths of a second, and of a hang its limit and 15 s to explain it.
    assert steps_s < (4.0 + 15.0 if limits else 1.0) + 5.0
    assert time.time() - began < 2 * PATIENCE_S


@pytest.mark.full
def test_two_runs_on_one_machine(tmp_path: Path) -> None:
    """Case 12."""
    command = pretrain_command(*RUN, "--tp", "2")
    runs = [
        subprocess.Popen(
            [*command, "--runs", str(tmp_path / name)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **ONE_THREAD},
        )
        for name in ("a", "b")
    ]
    for process in runs:
        _, stderr = process.communicate(timeout=2 * PATIENCE_S)
        assert (process.returncode, stderr) == (0, "")


def test_a_slow_rank_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 9: the run goes on, and says who keeps it."""
    monkeypatch.setenv("MEGALITE_FAULT", "slow:rank=1,step=2,seconds=0.5")
    with running(tmp_path, "--tp", "2") as process:
        told = ""
        while "keeps others waiting" not in told:
            told = process.stderr.readline()
            assert process.poll() is None, "it ended before"
        lately = [process.stderr.readline() for _ in range(4)]
        process.send_signal(signal.SIGINT)
        stdout, _ = end(process)
    assert process.returncode == ExitCode.STOPPED
    assert re.match(r"megalite: rank 1 on \S+ keeps others waiting: it computes \d+%", told)
    assert told.rstrip().endswith("most of it in: reading samples")
    (slow,) = events(tmp_path, "slow")
    assert (slow["rank"], slow["phase"]) == (1, "reading samples")
    assert lately[0] == "of a step [ms], lately:\n"
    assert [re.match(r"rank|\d on \S+", line)[0][:5] for line in lately[1:]] == [
        "rank",
        "0 on ",
        "1 on ",
    ]
    (times,) = events(tmp_path, "times")
    own, others = (each.get("reading samples", 0.0) for each in reversed(times["ranks"]))
    assert own > 0.5 > others
    assert re.search(r"^1 \(tp 1, pp 0, dp 0\) .*\d$", stdout, re.MULTILINE)


@pytest.mark.parametrize("layout", ["--dp 1", "--pp 2"])
def test_a_run_that_nobody_reads_goes_on(tmp_path: Path, layout: str) -> None:
    """`| head -1`, or a `tee` that has died."""
    command = pretrain_command(
        *RUN, "--runs", str(tmp_path), *layout.split(), "--log-interval", "1"
    )
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **ONE_THREAD}
    ) as process:
        assert process.stdout.readline().startswith(b"megalite ")
        process.stdout.close()
        told = process.stderr.read().decode()
    assert process.returncode == ExitCode.DONE, told
    assert told == "megalite: nobody reads what this run prints any more; it goes on\n"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 5


def test_a_wrong_fault_is_told_before_anything_starts(tmp_path: Path) -> None:
    result = run(tmp_path, "kil:step=3", "--tp", "2")
    assert result.returncode == ExitCode.BAD_INPUT
    assert result.stderr.startswith("megalite: MEGALITE_FAULT 'kil:step=3': ")
    assert not list(tmp_path.iterdir())
