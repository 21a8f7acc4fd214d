"""Do all ranks run the same thing? Asked over the rendezvous store before any group exists.

Ranks with different configurations would wait for each other in different collectives. So every
rank publishes what it is about to run, rank 0 compares, and all learn the verdict.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from megalite.errors import ConfigError


def agree(
    store: dist.Store,
    rank: int,
    size: int,
    facts: Mapping[str, Any],
    problems: Sequence[str] = (),
) -> None:
    """Compare `facts` over all ranks, and let all ranks know of the problems of any.

    Args:
        store: the rendezvous store.
        rank, size: of the world.
        facts: plain values, nested by group.
        problems: why this rank cannot start.

    Raises:
        ConfigError: on every rank: the problems, or else the ranks and fields that differ from
            rank 0's.
    """
    store.set(f"facts/{rank}", json.dumps({"facts": facts, "problems": list(problems)}))
    if rank == 0:
        told = [json.loads(store.get(f"facts/{other}")) for other in range(size)]
        store.set("verdict", json.dumps(_problems(told) or _all_differences(told)))
    found = json.loads(store.get("verdict"))
    if found:
        # Rank 0 may host the store: it stays until all have read the verdict.
        heard = store.add("heard", 1)
        while rank == 0 and heard < size:
            time.sleep(0.01)
            heard = store.add("heard", 0)
        raise ConfigError(found)


def _problems(told: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each problem once, with the ranks that have it unless all do."""
    ranks: dict[str, list[int]] = {}
    for rank, message in enumerate(told):
        for problem in message["problems"]:
            ranks.setdefault(problem, []).append(rank)
    return [
        problem if len(having) == len(told) else f"{problem} (rank {', '.join(map(str, having))})"
        for problem, having in ranks.items()
    ]


def _all_differences(told: Sequence[Mapping[str, Any]]) -> list[str]:
    first = told[0]["facts"]
    return [
        difference
        for rank, message in enumerate(told)
        for difference in _differences(rank, first, message["facts"])
    ]


def _differences(rank: int, first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """One sentence per field."""
    flat_first, flat_other = _flatten(first), _flatten(other)
    return [
        f"ranks disagree on {name}: rank 0 has {flat_first.get(name)!r}, "
        f"rank {rank} has {flat_other.get(name)!r}"
        for name in sorted(set(flat_first) | set(flat_other))
        if flat_first.get(name) != flat_other.get(name)
    ]


def _flatten(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
