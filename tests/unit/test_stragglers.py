"""A rank that makes the others wait is named once, with what it does."""

from __future__ import annotations

from megalite.parallel.hang import State
from megalite.parallel.step_times import WAITING
from megalite.parallel.stragglers import IN_A_ROW, Stragglers


def state(rank: int, computes: float) -> State:
    shares = {WAITING: 1 - computes, "forward": 0.75 * computes, "reading samples": 0.25 * computes}
    return State(rank, 1, "step 7", "", 0.1, shares=shares, host=f"host-{rank}")


def named(stragglers: Stragglers, *computes: float) -> list[int]:
    found = stragglers.compare([state(rank, share) for rank, share in enumerate(computes)])
    return [straggler.rank for straggler in found]


def test_a_slow_rank_is_named_once_until_it_has_caught_up() -> None:
    stragglers = Stragglers()
    told = [named(stragglers, 0.3, 0.9, 0.35, 0.3) for _ in range(IN_A_ROW + 3)]
    assert told == [[]] * (IN_A_ROW - 1) + [[1]] + [[]] * 3
    assert named(stragglers, 0.3, 0.3, 0.3, 0.3) == []
    told = [named(stragglers, 0.3, 0.9, 0.35, 0.3) for _ in range(IN_A_ROW)]
    assert told == [[]] * (IN_A_ROW - 1) + [[1]]


def test_what_is_said_of_it() -> None:
    stragglers = Stragglers()
    states = [state(0, 0.2), state(1, 0.9), state(2, 0.2)]
    (*_, found) = [stragglers.compare(states) for _ in range(IN_A_ROW)]
    assert [str(straggler) for straggler in found] == [
        "rank 1 on host-1 keeps others waiting: it computes 90% of the time, the median rank 20%; "
        "most of it in: forward"
    ]


def test_of_two_ranks_the_slow_one() -> None:
    stragglers = Stragglers()
    assert [named(stragglers, 0.95, 0.6) for _ in range(IN_A_ROW)][-1] == [0]


def test_what_is_no_straggler() -> None:
    """A hiccup; little difference; ranks that hardly compute; nothing known of one rank."""
    stragglers = Stragglers()
    for _ in range(5):
        assert named(stragglers, 0.3, 0.9, 0.3) == []
        assert named(stragglers, 0.3, 0.3, 0.3) == []
    for _ in range(5):
        assert named(stragglers, 0.7, 0.95, 0.7) == named(stragglers, 0.7, 0.95) == []
        assert named(stragglers, 0.05, 0.15, 0.05) == []
        assert stragglers.compare([state(0, 0.1), state(1, 0.9), None]) == []
