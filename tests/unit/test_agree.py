"""Ranks that would run different things all learn which field differs, and whose problem it is."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

from megalite.errors import ConfigError
from megalite.parallel.agree import agree


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
    assert told == [["no file x (rank 1, 2)", "disk full (rank 2)"]] * 3
    assert verdicts([{}] * 2, {0: ["no file x"], 1: ["no file x"]}) == [["no file x"]] * 2
