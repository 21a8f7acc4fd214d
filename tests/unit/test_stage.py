"""A balanced split gives each layer to one stage and no other split has a faster slowest stage;
`--pp-layers` is taken as it is."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, pairwise

import pytest

from megalite.config import Config, resolve
from megalite.models.stage import balanced_layers, head_cost_in_layers, stage_specs
from megalite.presets import PRESETS

COSTS = (0.0, 0.25, 0.5, 1.0, 1.3, 2.5, 7.0, 60.0)


def slowest(layers: tuple[int, ...], head_cost: float) -> float:
    return max([*layers[:-1], layers[-1] + head_cost])


def all_splits(layers: int, stages: int) -> list[tuple[int, ...]]:
    cuts = combinations(range(1, layers), stages - 1)
    return [tuple(b - a for a, b in pairwise((0, *cut, layers))) for cut in cuts]


@pytest.mark.parametrize("layers", range(1, 41))
def test_layers_are_conserved_and_contiguous(layers: int) -> None:
    for stages in range(1, layers + 1):
        for cost in COSTS:
            split = balanced_layers(layers, stages, cost)
            assert len(split) == stages
            assert sum(split) == layers
            assert min(split) >= 1
        config = resolve(Config().replace(num_layers=layers, pp=stages))
        specs = stage_specs(config)
        owned = [i for s in specs for i in range(s.first_layer, s.first_layer + s.num_layers)]
        assert owned == list(range(layers))
        assert [s.stage for s in specs] == list(range(stages))
        assert [s.has_embedding for s in specs] == [i == 0 for i in range(stages)]
        assert [s.has_head for s in specs] == [i == stages - 1 for i in range(stages)]
        cost = head_cost_in_layers(config)
        assert tuple(s.num_layers for s in specs) == balanced_layers(layers, stages, cost)


@pytest.mark.parametrize("layers", range(1, 13))
def test_no_split_has_a_faster_slowest_stage(layers: int) -> None:
    for stages in range(1, layers + 1):
        splits = all_splits(layers, stages)
        for cost in COSTS:
            ours = balanced_layers(layers, stages, cost)
            assert slowest(ours, cost) == min(slowest(split, cost) for split in splits)
            equals = [s for s in splits if slowest(s, cost) == slowest(ours, cost)]
            from_even = Fraction(layers, stages)
            assert abs(ours[-1] - from_even) == min(abs(s[-1] - from_even) for s in equals)


@pytest.mark.parametrize("cost", COSTS)
def test_layers_left_over_go_to_late_stages(cost: float) -> None:
    for layers in range(1, 41):
        for stages in range(2, layers + 1):
            before_last = balanced_layers(layers, stages, cost)[:-1]
            assert list(before_last) == sorted(before_last)
            assert before_last[-1] - before_last[0] <= 1


@pytest.mark.parametrize(
    ("layers", "stages", "cost", "want"),
    [
        (8, 4, 0.0, (2, 2, 2, 2)),
        (32, 1, 9.0, (32,)),
        (32, 4, 1.0, (8, 8, 8, 8)),
        (32, 4, 1.5, (8, 8, 9, 7)),
        (10, 4, 0.0, (2, 3, 3, 2)),
        (10, 4, 3.0, (3, 3, 3, 1)),
        (4, 4, 5.0, (1, 1, 1, 1)),
        (5, 2, 0.0, (3, 2)),
        (5, 2, 100.0, (4, 1)),
    ],
)
def test_splits_by_hand(layers: int, stages: int, cost: float, want: tuple[int, ...]) -> None:
    assert balanced_layers(layers, stages, cost) == want


@pytest.mark.parametrize("split", [(1, 2, 1), (2, 1, 1), (1, 1, 2)])
def test_explicit_layers_are_taken_as_they_are(split: tuple[int, ...]) -> None:
    specs = stage_specs(resolve(Config().replace(num_layers=4, pp=3, pp_layers=split)))
    assert tuple(spec.num_layers for spec in specs) == split
    assert [spec.first_layer for spec in specs] == [0, split[0], split[0] + split[1]]
    assert [(s.has_embedding, s.has_head) for s in specs] == [
        *((True, False), (False, False), (False, True))
    ]


def test_head_cost_by_hand() -> None:
    """Multiplications per token: head 8 x 100; layer 8 (4 + 2 x 2 + 4 + 3 x 10) + scores 4 x 6."""
    config = resolve(
        Config().replace(
            **dict(hidden_size=8, num_attention_heads=2, num_kv_heads=1, head_dim=2, seq_length=6),
            **dict(ffn_hidden_size=10, vocab_size=100),
        )
    )
    layer = 8 * (2 * 2 + 2 * 1 * 2) + 8 * 4 + 3 * 8 * 10 + 4 * 6
    assert head_cost_in_layers(config) == pytest.approx(800 / layer, rel=1e-15)


def test_the_head_of_a_preset() -> None:
    """128256 x 4096 over 4096 (6144 + 4096 + 3 x 14336) + 4096 x 8192 multiplications."""
    config = resolve(Config().replace(pp=4, **PRESETS["llama3-8b"]))
    assert head_cost_in_layers(config) == pytest.approx(128256 / 61440, rel=1e-15)
    assert tuple(spec.num_layers for spec in stage_specs(config)) == (8, 9, 9, 6)
