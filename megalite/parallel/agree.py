"""Do all ranks run the same thing? Asked over the rendezvous store before any group exists.

Ranks with different configurations would wait for each other in different collectives. So every
rank publishes what it is about to run, rank 0 compares, and all learn the verdict.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from megalite.errors import ConfigError


def agree(store: dist.Store, rank: int, size: int, facts: Mapping[str, Any]) -> None:
    """Compare `facts` over all ranks.

    Args:
        store: the rendezvous store.
        rank, size: of the world.
        facts: plain values, nested by group.

    Raises:
        ConfigError: on every rank, naming the ranks and fields that differ from rank 0's.
    """
    mine = json.dumps(facts, sort_keys=True)
    store.set(f"facts/{rank}", mine)
    if rank == 0:
        verdict = "; ".join(
            difference
            for other in range(1, size)
            if (theirs := store.get(f"facts/{other}").decode()) != mine
            for difference in _differences(other, json.loads(mine), json.loads(theirs))
        )
        store.set("verdict", verdict)
    problems = store.get("verdict").decode()
    if problems:
        raise ConfigError(problems.split("; "))


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
