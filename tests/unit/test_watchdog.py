"""When the watchdog ends a run, and when it lets it go on: two ranks, threads of one process."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import torch.distributed as dist

from megalite.events import Events
from megalite.exit_codes import ExitCode
from megalite.parallel import watchdog
from megalite.parallel.activity import Activity
from megalite.parallel.stop import StopRequest
from megalite.parallel.watchdog import Watchdog, read_states

LIMIT_S = 0.6


class EndedError(Exception):
    """In place of the end of a process."""


class World:
    """Two ranks; `ended` says with which codes they ended themselves."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.store = dist.HashStore()
        self.activities = [Activity(start_limit_s=LIMIT_S), Activity(start_limit_s=LIMIT_S)]
        self.ended: list[int] = []
        short = {"INTERVAL_S": 0.02, "SILENCE_S": 0.4, "STILL_S": 0.3, "LINGER_S": 0.1}
        for name, value in short.items():
            patch.setattr(watchdog, name, value)
        patch.setattr(watchdog.os, "_exit", self._exit)
        patch.setattr(watchdog, "silence", lambda: None)
        right = Watchdog._run

        def run(dog: Watchdog) -> None:
            with suppress(EndedError):
                right(dog)

        patch.setattr(Watchdog, "_run", run)

    def _exit(self, code: int) -> None:
        self.ended.append(code)
        raise EndedError

    def dogs(self) -> list[Watchdog]:
        return [
            Watchdog(self.store, rank, 2, a, StopRequest())
            for rank, a in enumerate(self.activities)
        ]

    def run(self, seconds: float, meanwhile: Callable[[], None] = lambda: None) -> None:
        with ExitStack() as stack:
            dogs = [stack.enter_context(dog) for dog in self.dogs()]
            until = time.monotonic() + seconds
            while time.monotonic() < until and not self.ended:
                meanwhile()
                time.sleep(0.02)
            time.sleep(1.0 if self.ended else 0.0)
            for dog in dogs:
                # Together: one that looks on while the other leaves would have something to say.
                dog._ended.set()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    yield World(monkeypatch)
    assert threading.active_count() < 10


def test_two_ranks_that_stand_still_end(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.activities[0].at("recv", 3, awaits="1RECV_F0", peer=1)
    world.activities[1].at("asleep")
    world.run(5.0)
    assert world.ended == [ExitCode.HUNG, ExitCode.HUNG]
    told = capsys.readouterr().err
    assert told.count("megalite: nothing moves: rank 0 has been in start for ") == 1
    assert "rank 1 never arrived: it is in start, asleep; rank 0 waits for it" in told


def test_a_rank_within_its_own_limit_ends_with_the_others(world: World) -> None:
    world.activities[1].begin("saving", allowance_s=1000.0)
    world.run(5.0)
    assert world.ended == [ExitCode.HUNG, ExitCode.HUNG]


def test_a_rank_that_moves_slowly_keeps_all_alive(world: World) -> None:
    numbers = iter(range(1000))
    world.run(2.5, lambda: world.activities[1].at(f"action {next(numbers) // 2}"))
    assert world.ended == []


def test_a_patient_rank_keeps_all_alive(world: World) -> None:
    world.activities[1].begin("tokenizing", patient=True)
    world.run(2.5)
    assert world.ended == []


def test_a_rank_that_has_ended_is_named(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = world.dogs()
    with second:
        pass
    with first:
        time.sleep(2.5)
    assert world.ended == [ExitCode.HUNG]
    assert "rank 1 has ended, but others are in start" in capsys.readouterr().err


def test_a_rank_that_no_longer_speaks_is_named(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = world.dogs()
    second._publish()
    with first:
        time.sleep(2.5)
    assert world.ended == [ExitCode.HUNG]
    assert "rank 1 is dead or stopped" in capsys.readouterr().err


def test_what_moves_while_it_is_explained_goes_on(world: World) -> None:
    """A rank looks once more before all end."""
    first, second = world.dogs()
    with first, second:
        while world.store.add("explaining", 0) == 0:
            time.sleep(0.01)
        for activity in world.activities:
            activity.begin("step 2", allowance_s=100.0)
        time.sleep(1.0)
        assert world.ended == []
        assert world.store.add("explaining", 0) == 0


def test_stacks_of_a_rank_that_hangs_are_kept(world: World, tmp_path: Path) -> None:
    for dog in world.dogs():
        dog.watch({}, tmp_path, Events(None))
        dog._dump_stacks()
    stacks = [(tmp_path / f"stacks/rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert all("test_stacks_of_a_rank_that_hangs_are_kept" in stack for stack in stacks)


def test_a_wish_of_the_launcher_reaches_the_rank(world: World) -> None:
    first, _ = world.dogs()
    with first:
        assert first._stop.by is None
        world.store.set(watchdog.STOP, "SIGTERM")
        until = time.monotonic() + 5.0
        while first._stop.by is None and time.monotonic() < until:
            time.sleep(0.01)
    assert first._stop.by is signal.SIGTERM


@pytest.mark.parametrize("ended", [True, False])
def test_a_terminated_rank_ends_once_another_has_gone(
    world: World, monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    first, second = world.dogs()
    world.activities[0].begin("step 9", allowance_s=1000.0)
    second._publish()
    monkeypatch.setattr(first._stop, "is_terminated", lambda: ended)
    with first:
        time.sleep(1.5)
    assert world.ended == ([ExitCode.HUNG] if ended else [])


class Suspended(threading.Event):
    """Whoever waits for it sleeps with its process."""

    def wait(self, timeout: float | None = None) -> bool:
        return super().wait(0.7 if timeout else None)


def test_a_suspended_process_is_not_overdue(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "SUSPENDED_S", 0.5)
    since = world.activities[0].since
    first, _ = world.dogs()
    first._ended = Suspended()
    with first:
        time.sleep(2.2)
    assert world.ended == [] and world.activities[0].since > since + 1.0


def test_members_of_groups_are_told_once(world: World) -> None:
    from megalite.parallel.activity import CallTrace

    first, _ = world.dogs()
    trace = CallTrace()
    first.watch({"tensor": ((0, 1), trace)}, None, Events(None))
    trace.call("all_reduce")
    first._publish()
    states = read_states(world.store, 2)
    assert states[1] is None and states[0] is not None
    assert states[0].calls["tensor"].ranks == (0, 1)
    assert states[0].calls["tensor"].names == {1: "all_reduce"}
