"""Do all ranks run the same thing? Asked over the rendezvous store before any group exists.

Ranks with different configurations would wait for each other in different collectives. So every
rank publishes what it is about to run, rank 0 compares, and all learn the verdict.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megalite.errors import ConfigError

GRACE_S = 20.0
"""How much longer than rank 0 the others wait for its verdict."""


class MissingRanksError(RuntimeError):
    """Ranks that never said what they run."""


def agree(
    store: dist.Store,
    rank: int,
    size: int,
    facts: Mapping[str, Any],
    problems: Sequence[str] = (),
    limit_s: float = 600.0,
) -> None:
    """Compare `facts` over all ranks, and let all ranks know of the problems of any.

    Args:
        store: the rendezvous store.
        rank, size: of the world.
        facts: plain values, nested by group.
        problems: why this rank cannot start.
        limit_s: how long rank 0 waits for the others.

    Raises:
        ConfigError: on every rank: the problems, or else the ranks and fields that differ from
            rank 0's.
        MissingRanksError: on every rank that is there.
    """
    store.set(f"facts/{rank}", json.dumps({"facts": facts, "problems": list(problems)}))
    if rank == 0:
        missing = _missing(store, size, limit_s)
        found: list[str] = []
        if not missing:
            told = [json.loads(store.get(f"facts/{other}")) for other in range(size)]
            found = _problems(told) or _all_differences(told)
        store.set("verdict", json.dumps({"missing": missing, "problems": found}))
    store.wait(["verdict"], timedelta(seconds=limit_s + GRACE_S))
    verdict = json.loads(store.get("verdict"))
    if verdict["missing"] or verdict["problems"]:
        _wait_until_heard(store, rank, size - len(verdict["missing"]))
    if verdict["missing"]:
        raise MissingRanksError(
            f"{name_ranks(verdict['missing'])} of {size} did not get ready within {limit_s:.0f} s "
            "(--distributed-timeout-minutes); their own output says why"
        )
    if verdict["problems"]:
        raise ConfigError(verdict["problems"])


def name_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5`."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def _missing(store: dist.Store, size: int, limit_s: float) -> list[int]:
    """Ranks that have not published their facts when the time is up."""
    keys = [f"facts/{rank}" for rank in range(size)]
    try:
        store.wait(keys, timedelta(seconds=limit_s))
    except dist.DistStoreError:
        return [rank for rank, key in enumerate(keys) if not store.check([key])]
    return []


def _wait_until_heard(store: dist.Store, rank: int, present: int) -> None:
    """Rank 0 may host the store: it stays until all that are there have read the verdict."""
    heard = store.add("heard", 1)
    deadline = time.monotonic() + GRACE_S
    while rank == 0 and heard < present and time.monotonic() < deadline:
        time.sleep(0.01)
        heard = store.add("heard", 0)


def _problems(told: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each problem once, with the ranks that have it unless all do."""
    ranks: dict[str, list[int]] = {}
    for rank, message in enumerate(told):
        for problem in message["problems"]:
            ranks.setdefault(problem, []).append(rank)
    return [
        problem if len(having) == len(told) else f"{problem} ({name_ranks(having)})"
        for problem, having in ranks.items()
    ]


def _all_differences(told: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence for each field and value that differs from rank 0's."""
    first = _flatten(told[0]["facts"])
    ranks: dict[tuple[str, str], list[int]] = {}
    for rank, message in enumerate(told):
        other = _flatten(message["facts"])
        for name in set(first) | set(other):
            if first.get(name) != other.get(name):
                ranks.setdefault((name, repr(other.get(name))), []).append(rank)
    return [
        f"ranks disagree on {name}: rank 0 has {first.get(name)!r}, {name_ranks(having)} "
        f"ha{'ve' if len(having) > 1 else 's'} {value}"
        for (name, value), having in sorted(ranks.items())
    ]


def _flatten(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
