"""MEGALITE_FAULT: what it means, when it fires, and what is wrong with it."""

from __future__ import annotations

import errno

import pytest
from commands import violations

from megalite.errors import ConfigError
from megalite.faults import KINDS, POINTS, VARIABLE, Fault, Faults, InjectedError, banner, parse


def test_a_spec_is_read() -> None:
    assert parse("") == parse(" ; ") == ()
    assert parse("kill:rank=1,step=3") == (Fault("kill", rank=1, step=3),)
    assert parse("slow:step=2,seconds=0.5 ; enospc:at=half-shard,always") == (
        Fault("slow", step=2, steps=0, seconds=0.5),
        Fault("enospc", at="half-shard", always=True),
    )


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("kil:step=3", "'kil' is no kind of fault; did you mean kill?"),
        ("x:step=3", f"choose one of {', '.join(KINDS)}"),
        ("kill", "give step="),
        ("kill:rank=1", "give step="),
        ("kill:step=0", "step=0: must be above 0"),
        ("kill:step=3,rank=-1", "rank=-1: must be at least 0"),
        ("kill:step=x", "step=x: expected a number, as in step=3"),
        ("kill:stp=3", "'stp' is not known; did you mean step?"),
        ("kill:step=1,step=2", "step is given twice"),
        ("kill:at=half-shrad", "did you mean half-shard?"),
        ("kill:step=3,seconds=2", "seconds= is of slow, not of kill"),
        ("kill:step=3,always=1", "always takes no value"),
        ("slow:step=1,seconds=nan", "seconds=nan: must be above 0"),
        ("nan:at=half-shard", "nan happens in a step"),
        ("enospc:step=3", f"enospc happens in a save: give at={'|'.join(POINTS)}"),
    ],
)
def test_a_wrong_spec_is_a_sentence(spec: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"kill:step=3;{spec}")
    (sentence,) = caught.value.violations
    assert sentence.startswith(f"{VARIABLE} {spec!r}: ") and words in sentence


def test_a_wrong_spec_is_told_with_what_else_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "kil:step=3")
    assert [v.split()[0] for v in violations("--steps", "0")] == [VARIABLE, "--steps"]


def test_a_rank_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "kill:rank=4,step=1")
    (sentence,) = violations("--tp", "4")
    assert sentence == f"{VARIABLE}: rank=4, but the ranks of this run are 0 to 3"


def test_steps_in_which_a_fault_fires() -> None:
    def steps(spec: str) -> list[int]:
        (fault,) = parse(spec)
        return [step for step in range(1, 8) if fault.fires(step)]

    assert steps("nan:step=3") == [3]
    assert steps("nan:step=3,steps=2") == [3, 4]
    assert steps("slow:step=5") == [5, 6, 7]
    assert steps("kill:at=half-shard") == [1, 2, 3, 4, 5, 6, 7]
    assert steps("kill:at=half-shard,step=4") == [4]


def test_only_its_rank_and_only_the_first_start() -> None:
    env = {VARIABLE: "exc:rank=1,step=2;exc:rank=1,step=3,always"}

    def raises(rank: int, attempt: int, step: int) -> bool:
        try:
            Faults.of(env, rank, attempt).in_step(step)
        except InjectedError:
            return True
        return False

    assert [raises(1, 0, step) for step in (1, 2, 3)] == [False, True, True]
    assert [raises(1, 1, step) for step in (1, 2, 3)] == [False, False, True]
    assert not any(raises(0, 0, step) for step in (1, 2, 3))
    assert not any(Faults.none().spoils_gradients(step) for step in (1, 2, 3))
    assert banner(env, 0).count("rank 1 raises in step") == 2
    assert banner(env, 1).count("rank 1 raises in step") == 1
    assert banner({}, 0) == banner({VARIABLE: "kill:step=1"}, 1) == ""


def test_points_of_a_save() -> None:
    faults = Faults(parse("enospc:at=half-shard,step=4"))
    for point in POINTS:
        faults.at(point, 3)
        if point != "half-shard":
            faults.at(point, 4)
    with pytest.raises(OSError) as caught:
        faults.at("half-shard", 4)
    assert caught.value.errno == errno.ENOSPC
    faults.in_step(4)
