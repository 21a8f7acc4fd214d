"""World ranks and coordinates are a bijection with tp fastest, the groups of an axis partition the
world, and the pairs and copies that share a tensor are the ones that must."""

from __future__ import annotations

import random
from itertools import pairwise, product

import pytest

from megalite.parallel.topology import AXES, Coordinates, Topology

_DRAW = random.Random(1).choice
SIZES = [1, 2, 3, 4, 6, 8]
TOPOLOGIES = sorted(
    {(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)}
    | {(_DRAW(SIZES), _DRAW(SIZES), _DRAW(SIZES)) for _ in range(60)}
)
every_topology = pytest.mark.parametrize(
    "topology",
    [Topology(tp=tp, pp=pp, dp=dp) for tp, pp, dp in TOPOLOGIES],
    ids=lambda t: f"tp{t.tp}-pp{t.pp}-dp{t.dp}",
)


def test_a_grid_by_hand() -> None:
    topology = Topology(tp=2, pp=2, dp=3)
    assert topology.world_size == 12
    assert AXES == ("pp", "dp", "tp")
    assert topology.world_rank(pp=1, dp=2, tp=1) == 11
    assert topology.world_rank(pp=1) == 6
    assert topology.world_rank(dp=1) == 2
    assert topology.coordinates(9) == Coordinates(pp=1, dp=1, tp=1)
    assert topology.groups("tp") == ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11))
    assert topology.groups("dp") == ((0, 2, 4), (1, 3, 5), (6, 8, 10), (7, 9, 11))
    assert topology.groups("pp") == ((0, 6), (1, 7), (2, 8), (3, 9), (4, 10), (5, 11))
    assert topology.embedding_pairs() == ((0, 6), (1, 7), (2, 8), (3, 9), (4, 10), (5, 11))


@every_topology
def test_coordinates_and_world_ranks_are_a_bijection(topology: Topology) -> None:
    places = list(product(range(topology.pp), range(topology.dp), range(topology.tp)))
    ranks = [topology.world_rank(pp=pp, dp=dp, tp=tp) for pp, dp, tp in places]
    assert ranks == list(range(topology.world_size)), "counted with tp fastest, then dp"
    back = [topology.coordinates(rank) for rank in ranks]
    assert [(at.pp, at.dp, at.tp) for at in back] == places


@every_topology
@pytest.mark.parametrize("axis", AXES)
def test_groups_of_an_axis_partition_the_world(topology: Topology, axis: str) -> None:
    groups = topology.groups(axis)
    assert sorted(rank for group in groups for rank in group) == list(range(topology.world_size))
    others = [name for name in AXES if name != axis]
    places = set()
    for group in groups:
        at = [topology.coordinates(rank) for rank in group]
        assert [getattr(c, axis) for c in at] == list(range(getattr(topology, axis)))
        (place,) = {tuple(getattr(c, name) for name in others) for c in at}
        places.add(place)
    assert len(places) == len(groups)


@every_topology
def test_neighbours_on_tp_are_adjacent_and_stages_are_farthest(topology: Topology) -> None:
    for axis, stride in (("tp", 1), ("dp", topology.tp), ("pp", topology.tp * topology.dp)):
        for group in topology.groups(axis):
            assert {b - a for a, b in pairwise(group)} <= {stride}


@every_topology
def test_embedding_pairs_are_the_ends_of_each_pipeline(topology: Topology) -> None:
    pairs = topology.embedding_pairs()
    if topology.pp == 1:
        assert pairs == ()
        return
    assert len(pairs) == len(set(pairs)) == topology.tp * topology.dp
    for first, last in pairs:
        a, b = topology.coordinates(first), topology.coordinates(last)
        assert (a.pp, b.pp) == (0, topology.pp - 1)
        assert (a.dp, a.tp) == (b.dp, b.tp)


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "kv_heads", "want"),
    [
        (4, 1, 1, 2, ((0, 1), (2, 3))),
        (8, 1, 1, 2, ((0, 1, 2, 3), (4, 5, 6, 7))),
        (8, 1, 1, 4, ((0, 1), (2, 3), (4, 5), (6, 7))),
        (4, 2, 1, 2, ((0, 1), (2, 3), (4, 5), (6, 7))),
        (4, 1, 2, 2, ((0, 1), (2, 3), (4, 5), (6, 7))),
        # Every rank has its own head, or several, or all share one: no group of its own.
        *((4, 2, 2, kv_heads, ()) for kv_heads in (1, 4, 8)),
        (1, 2, 2, 1, ()),
    ],
)
def test_copies_of_a_key_value_head(tp: int, pp: int, dp: int, kv_heads: int, want: tuple) -> None:
    assert Topology(tp=tp, pp=pp, dp=dp).kv_replica_groups(kv_heads) == want


@every_topology
def test_copies_are_neighbours_in_one_tensor_group(topology: Topology) -> None:
    for kv_heads in (n for n in range(2, topology.tp) if topology.tp % n == 0):
        groups = topology.kv_replica_groups(kv_heads)
        ranks = [rank for group in groups for rank in group]
        assert ranks == list(range(topology.world_size))
        for group in groups:
            at = [topology.coordinates(rank) for rank in group]
            assert len({(c.pp, c.dp) for c in at}) == 1
            assert len({c.tp * kv_heads // topology.tp for c in at}) == 1, "one head"
            assert len(group) == topology.tp // kv_heads
