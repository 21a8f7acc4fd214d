"""Ranks that would run different things all learn which field differs, and whose problem it is."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from megalite.errors import ConfigError
from megalite.parallel.agree import MissingRanksError, agree, name_ranks


def verdicts(facts: list[dict[str, Any]], problems: dict[int, list[str]]) -> list[list[str]]:
    """What each rank is told; empty for agreement."""
    store = dist.HashStore()

    def ask(rank: int) -> list[str]:
        try:
            agree(store, rank, len(facts), facts[rank], problems.get(rank, []))
        except ConfigError as error:
            return error.violations
        return []

    with ThreadPoolExecutor(len(facts)) as pool:
        return list(pool.map(ask, range(len(facts))))


def test_equal_facts_pass() -> None:
    facts = {"train": {"lr": 1e-3, "steps": 5}, "corpus": "abc"}
    assert verdicts([facts] * 4, {}) == [[]] * 4


def test_every_difference_is_told_to_every_rank() -> None:
    first = {"train": {"lr": 1e-3, "steps": 5}, "corpus": "abc"}
    other = {"train": {"lr": 1e-3, "steps": 6}, "corpus": "xyz"}
    told = verdicts([first, first, other], {})
    assert told[0] == told[1] == told[2]
    assert told[0] == [
        "ranks disagree on corpus: rank 0 has 'abc', rank 2 has 'xyz'",
        "ranks disagree on train.steps: rank 0 has 5, rank 2 has 6",
    ]


def test_a_field_that_only_one_rank_has_is_named() -> None:
    told = verdicts([{"a": 1}, {"a": 1, "b": 2}], {})
    assert told[1] == ["ranks disagree on b: rank 0 has None, rank 1 has 2"]


def test_problems_are_told_once_with_their_ranks() -> None:
    told = verdicts([{}] * 3, {1: ["no file x"], 2: ["no file x", "disk full"]})
    assert told == [["no file x (ranks 1-2)", "disk full (rank 2)"]] * 3
    assert verdicts([{}] * 2, {0: ["no file x"], 1: ["no file x"]}) == [["no file x"]] * 2


def test_many_ranks_with_one_difference_are_one_sentence() -> None:
    facts = [{"lr": 1e-3 if rank < 2 else 2e-3} for rank in range(6)]
    told = verdicts(facts, {})
    assert told == [["ranks disagree on lr: rank 0 has 0.001, ranks 2-5 have 0.002"]] * 6


def test_ranks_that_never_come_are_named_to_the_others() -> None:
    store = dist.HashStore()

    def ask(rank: int) -> str:
        with pytest.raises(MissingRanksError) as caught:
            agree(store, rank, 5, {}, limit_s=0.3)
        return str(caught.value)

    with ThreadPoolExecutor(3) as pool:
        told = list(pool.map(ask, [0, 1, 3]))
    assert told[0].startswith("ranks 2, 4 of 5 did not get ready within 0 s")
    assert told[0] == told[1] == told[2]


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([0, 1], "ranks 0-1"), ([7, 0, 1, 2, 5], "ranks 0-2, 5, 7")],
)
def test_name_ranks(ranks: list[int], text: str) -> None:
    assert name_ranks(ranks) == text
