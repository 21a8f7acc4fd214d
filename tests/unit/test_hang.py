"""From the ranks' last words to who keeps whom waiting."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megalite.parallel import activity as activity_module
from megalite.parallel.activity import Activity, CallTrace
from megalite.parallel.hang import Calls, State, explain


def state(rank: int, doing: str = "", **values: Any) -> State:
    values = {"position_phase": "step 7", **values}
    return State(rank=rank, beat=1, phase="step 7", doing=doing, phase_s=100.0, **values)


def tensor(called: int, waiting: int = 0, **names: str) -> dict[str, Calls]:
    numbered = {int(k[1:]): v for k, v in names.items()} or {called: "all_gather"}
    return {"tensor": Calls((0, 1), called, waiting, numbered)}


def test_a_state_survives_its_text_form() -> None:
    import json

    full = state(3, "x", device="y", awaits="1RECV_F3", peer=2, position=4, calls=tensor(5, 5))
    assert State.from_json(json.loads(json.dumps(full.to_json()))) == full


def test_the_rank_behind_in_a_collective_never_arrived() -> None:
    found = explain([state(0, calls=tensor(9, 9)), state(1, "asleep", calls=tensor(8))], (), {})
    assert found.culprits == ("rank 1 never arrived: it is in step 7, asleep; rank 0 waits for it",)
    assert found.table == (
        "rank 0: step 7, waiting in all_gather (number 9 of its tensor group) with rank 1; "
        "for 100 s",
        "rank 1: step 7, asleep; for 100 s",
    )


def test_different_collectives_under_one_number() -> None:
    first = state(0, calls=tensor(9, 9, n9="broadcast"))
    second = state(1, calls=tensor(9, 9, n9="all_reduce"))
    assert explain([first, second], (), {}).culprits == (
        "ranks 0 and 1 disagree on collective 9 of their tensor group: broadcast and all_reduce",
    )


def test_a_rank_that_awaits_an_earlier_collective_than_the_other_has_called() -> None:
    """Asynchronous calls run ahead of the one that is waited for."""
    ahead = state(0, calls=tensor(12, 9, n9="all_reduce", n12="all_reduce"))
    behind = state(1, "computing", calls=tensor(8))
    assert "rank 1 never arrived" in explain([ahead, behind], (), {}).culprits[0]
    arrived = replace(behind, calls=tensor(9, n9="all_reduce"))
    assert explain([ahead, arrived], (), {}).culprits == (
        "no rank waits for another: see the table",
    )


def test_a_forgotten_message_and_one_that_is_still_to_come() -> None:
    waiting = state(1, awaits="1RECV_F2", peer=0, position=3)
    sends = {(0, "1RECV_F2"): 6}
    before, past = state(0, "reading", position=4), state(0, "further on", position=8)
    assert "rank 0 never arrived" in explain([before, waiting], (), sends).culprits[0]
    assert (
        "rank 0 is past the action that sends what rank 1 awaits in 1RECV_F2"
        in (explain([past, waiting], (), sends).culprits[0])
    )
    # In another phase positions say nothing.
    other = replace(past, position_phase="step 6")
    assert "rank 0 never arrived" in explain([other, waiting], (), sends).culprits[0]


def test_the_end_of_a_chain_is_the_culprit() -> None:
    chain = [
        state(0, awaits="0RECV_B0", peer=1),
        state(1, awaits="1RECV_B0", peer=2),
        state(2, "asleep"),
    ]
    (culprit,) = explain(chain, (), {}).culprits
    assert culprit == "rank 2 never arrived: it is in step 7, asleep; rank 1 waits for it"


def test_ranks_in_a_circle() -> None:
    circle = [state(rank, awaits="x", peer=(rank + 1) % 3) for rank in range(3)]
    assert explain(circle, (), {}).culprits == (
        "ranks wait for each other: rank 0 for rank 1 in x, rank 1 for rank 2 in x, "
        "rank 2 for rank 0 in x",
    )


def test_ranks_that_have_begun_fewer_phases() -> None:
    ranks = [state(0, phases=3), state(1, "opening the device", phases=2), state(2, phases=3)]
    assert explain(ranks, (), {}).culprits == (
        "rank 1 is behind all others: it is in step 7, opening the device",
    )


def test_names_of_calls_that_are_long_past() -> None:
    first = state(0, calls=tensor(40, 11, n40="all_reduce"))
    second = state(1, "computing", calls=tensor(20, n11="all_reduce"))
    found = explain([first, second], (), {}).culprits
    assert found == ("no rank waits for another: see the table",)


def test_ranks_that_are_gone() -> None:
    found = explain([state(0, awaits="x", peer=1), state(1, "backward"), None], (1, 2), {})
    assert found.culprits == (
        "rank 1 is dead or stopped: no sign of life since it was in step 7, backward",
        "rank 2 never arrived: it has said nothing since the start",
    )
    assert found.table[1:] == (
        "rank 1: step 7, backward; no longer heard",
        "rank 2: nothing heard",
    )


def test_a_rank_that_has_ended() -> None:
    found = explain([state(0, "backward"), state(1, "the end", ended=True)], (), {})
    assert found.culprits == ("rank 1 has ended, but others are in step 7, backward",)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(activity_module.time, "monotonic", lambda: self.now)


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    activity = Activity(since=0.0)
    assert (activity.limit_s(), activity.limit_flag()) == (300.0, "--start-timeout")
    for step, seconds in enumerate((50.0, 1.0, 2.0, 3.0)):
        activity.begin(f"step {step}", "step")
        assert activity.limit_s() == (
            300.0 if step == 0 else max(100.0, 10 * [50, 25.5, 2][step - 1])
        )
        clock.now += seconds
    activity.begin("saving", "checkpoint", allowance_s=50.0)
    assert (activity.limit_s(), activity.limit_flag()) == (350.0, "--save-timeout")
    activity.save_limit_s = 20.0
    assert (activity.limit_s(), activity.limit_flag()) == (20.0, "--save-timeout")
    activity.begin("step 4", "step")
    assert activity.limit_s() == 100.0
    activity.longest_wait_s = 60.0
    assert activity.limit_s() == 54.0
    activity.step_limit_s = 7.0
    assert (activity.limit_s(), activity.limit_flag()) == (7.0, "--step-timeout")
    clock.now += 8.0
    assert activity.overdue_s() == 1.0
    activity.begin("tokenizing", patient=True)
    clock.now += 1e6
    assert activity.overdue_s() < 0


class Counting:
    """A GPU whose marks are reached when the test says so; numbers repeat after 8."""

    def __init__(self) -> None:
        self.next, self.reached = 6, 5

    def mark(self) -> int:
        number, self.next = self.next, (self.next + 1) % 8
        return number

    def passed_since(self, number: int) -> int:
        passed = (self.reached - number) % 8
        return passed if passed < 4 else -1


def test_the_gpu_is_in_what_it_has_reached_last() -> None:
    gpu = Counting()
    activity = Activity(progress=gpu)
    assert activity.device() is None
    for number in range(3):
        activity.phase = f"step {number}"
        activity.enter(f"action {number}", number, "1RECV_F2", 3)
    before = activity.device()
    assert before is not None
    assert (before.doing, before.phase) == ("what comes before", "step 0")
    gpu.reached = 7
    for _ in range(2):
        found = activity.device()
        assert found is not None
        assert (found.doing, found.phase, found.position) == ("action 1", "step 1", 1)
        assert (found.awaits, found.peer) == ("1RECV_F2", 3)
    assert (activity.doing, activity.awaits, activity.peer) == ("action 2", "", -1)
    gpu.reached = 0
    assert activity.device() is None
    activity.enter("action 3")
    found = activity.device()
    assert found is not None and found.doing == "action 2"


def test_a_gpu_that_waits_while_its_host_is_ahead() -> None:
    """The host of rank 1 sleeps; those of the others have called more than their GPUs have done."""
    ahead = "reading the figures of the step before"
    found = explain(
        [
            state(0, ahead, device="step 6, stage 0, forward", calls=tensor(12)),
            state(1, "asleep", calls=tensor(9)),
            state(2, ahead, device="step 6, recv", awaits="1RECV_F2", peer=0, position=5),
        ],
        (),
        {},
    )
    assert found.culprits == ("rank 1 never arrived: it is in step 7, asleep; rank 0 waits for it",)
    assert found.table[0].endswith(f"{ahead}; GPU in step 6, stage 0, forward; for 100 s")


def test_a_message_that_a_gpu_has_not_sent_although_its_host_has_come_by() -> None:
    sends = {(0, "1RECV_F2"): 3}
    receiver = state(1, device="step 6, recv", awaits="1RECV_F2", peer=0, position=9)
    receiver = replace(receiver, position_phase="step 6")
    past = state(0, device="step 6, backward", position=4, position_phase="step 6")
    assert (
        "rank 0 is past the action that sends" in explain([past, receiver], (), sends).culprits[0]
    )
    before = replace(past, position=2)
    assert "rank 0 never arrived" in explain([before, receiver], (), sends).culprits[0]


def test_call_traces_remember_the_last_names() -> None:
    trace = CallTrace()
    for number in range(1, 40):
        assert trace.call(f"call {number}") == number
    names = trace.names()
    assert names[39] == "call 39" and min(names) > 20
    assert all(name == f"call {number}" for number, name in names.items())
