"""A balanced split gives each block to one stage, and no other split has a faster slowest rank; a
layer is cut in two only where that makes it faster; `--pp-layers` is taken as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import pytest

from megalite.config import Config, resolve
from megalite.models.balance import WORTH_A_HALF, balanced_blocks
from megalite.models.stage import (
    LayerPart,
    StageSpec,
    attention_cost_in_layers,
    head_cost_in_layers,
    stage_specs,
)
from megalite.pipeline.placement import looped, v_shaped
from megalite.presets import PRESETS
from megalite.report import opening
from megalite.run_plan import stage_rank

HEADS = (0.0, 0.25, 0.5, 0.8, 1.3, 2.5, 7.0)
ATTENTIONS = (0.3, 0.42, 0.5, 0.6)


def times(blocks: Sequence[int], head: float, attention: float) -> list[float]:
    """Of each stage, in layers, block by block."""
    of_stages, first = [], 0
    for count in blocks:
        owned = range(first, first + count)
        of_stages.append(sum(1 - attention if block % 2 else attention for block in owned))
        first += count
    of_stages[-1] += head
    return of_stages


def slowest(blocks: Sequence[int], owners: Sequence[int], head: float, attention: float) -> float:
    """Time of the slowest rank."""
    of_stages = times(blocks, head, attention)
    return max(
        sum(time for time, owner in zip(of_stages, owners, strict=True) if owner == rank)
        for rank in owners
    )


def all_splits(blocks: int, stages: int, step: int = 1) -> Iterator[tuple[int, ...]]:
    for cut in combinations(range(step, blocks, step), stages - 1):
        yield tuple(b - a for a, b in pairwise((0, *cut, blocks)))


PLACES = [looped(1, 3), looped(2, 2), looped(4), looped(7), looped(3, 3), v_shaped(2), v_shaped(5)]


@pytest.mark.parametrize("owners", PLACES, ids=str)
def test_blocks_are_conserved(owners: tuple[int, ...]) -> None:
    for layers in range(-(-len(owners) // 2), 36, 3):
        for head in HEADS:
            split = balanced_blocks(layers, owners, head, 0.42)
            assert len(split) == len(owners)
            assert sum(split) == 2 * layers
            assert min(split) >= 1


@pytest.mark.parametrize("layers", [1, 4, 7, 12, 33])
@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("1f1b", 3), ("zb-v", 2)])
def test_stages_own_neighbouring_blocks(layers: int, schedule: str, chunks: int) -> None:
    for pp in range(1, 2 * layers // chunks + 1):
        config = Config().replace(num_layers=layers, pp=pp, schedule=schedule, chunks=chunks)
        config = resolve(config)
        specs, last = stage_specs(config), pp * chunks - 1
        assert [block for spec in specs for block in spec.blocks] == list(range(2 * layers))
        assert [s.stage for s in specs] == list(range(last + 1))
        assert [s.has_embedding for s in specs] == [i == 0 for i in range(last + 1)]
        assert [s.has_head for s in specs] == [i == last for i in range(last + 1)]
        costs = head_cost_in_layers(config), attention_cost_in_layers(config)
        counts = tuple(spec.num_blocks for spec in specs)
        assert counts == balanced_blocks(layers, stage_rank(config), *costs)


def test_no_split_has_a_faster_slowest_rank() -> None:
    """One stage on each rank; halves that gain a percent or less stay out."""
    for layers, ranks in [(1, 2), (2, 3), (3, 2), (4, 3), (5, 4), (6, 2), (6, 5), (7, 4)]:
        for head in HEADS:
            for attention in ATTENTIONS:
                _is_fastest(layers, looped(ranks), head, attention)


@pytest.mark.full
def test_no_split_has_a_faster_slowest_rank_in_all_sizes() -> None:
    for layers in range(1, 9):
        for ranks in range(1, min(6, 2 * layers) + 1):
            for head in HEADS:
                for attention in ATTENTIONS:
                    _is_fastest(layers, looped(ranks), head, attention)


def _is_fastest(layers: int, owners: tuple[int, ...], head: float, attention: float) -> None:
    costs = head, attention
    ours = balanced_blocks(layers, owners, *costs)
    time = slowest(ours, owners, *costs)
    best = min(slowest(s, owners, *costs) for s in all_splits(2 * layers, len(owners)))
    if all(count % 2 == 0 for count in ours):
        whole = [slowest(s, owners, *costs) for s in all_splits(2 * layers, len(owners), 2)]
        assert time == pytest.approx(min(whole), abs=1e-9)
        assert best >= WORTH_A_HALF * time - 1e-9
    else:
        assert time == pytest.approx(best, abs=1e-9), (layers, owners, costs, ours)


@pytest.mark.parametrize("owners", [v_shaped(2), v_shaped(3), looped(2, 2), looped(2, 3)], ids=str)
def test_ranks_of_several_stages(owners: tuple[int, ...]) -> None:
    """Whole layers are shared out as well as can be, and halves are faster than these."""
    for layers in (len(owners), len(owners) + 1, len(owners) + 2):
        whole = list(all_splits(2 * layers, len(owners), 2))
        for head in HEADS:
            for attention in (0.3, 0.42):
                costs = head, attention
                ours = balanced_blocks(layers, owners, *costs)
                time = slowest(ours, owners, *costs)
                least = min(slowest(s, owners, *costs) for s in whole)
                if any(count % 2 for count in ours):
                    assert time < WORTH_A_HALF * least
                else:
                    equals = [s for s in whole if slowest(s, owners, *costs) <= least + 1e-9]
                    assert time <= least + 1e-9
                    assert _unevenness(ours, *costs) <= 1e-9 + min(
                        _unevenness(s, *costs) for s in equals
                    )


def _unevenness(blocks: Sequence[int], head: float, attention: float) -> float:
    return sum(time**2 for time in times(blocks, head, attention))


def test_ranks_of_several_stages_are_near_the_best() -> None:
    for owners, layers in [(v_shaped(2), 6), (looped(2, 2), 6), (v_shaped(3), 7)]:
        for head in HEADS:
            costs = head, 0.42
            best = min(slowest(s, owners, *costs) for s in all_splits(2 * layers, len(owners)))
            assert slowest(balanced_blocks(layers, owners, *costs), owners, *costs) <= 1.05 * best


@pytest.mark.parametrize("head", HEADS)
def test_layers_left_over_go_to_late_stages(head: float) -> None:
    for layers in range(1, 30, 4):
        for ranks in range(2, layers + 1, 3):
            *before_last, _ = balanced_blocks(layers, looped(ranks), head, 0.5)
            if all(count % 2 == 0 for count in before_last):
                assert before_last == sorted(before_last)
                assert before_last[-1] - before_last[0] <= 2


@pytest.mark.parametrize(
    ("layers", "owners", "head", "attention", "want"),
    [
        # What is even already stays whole, and what halves would not make faster.
        (8, looped(4), 0.0, 0.4, (2, 2, 2, 2)),
        (32, looped(1), 9.0, 0.4, (32,)),
        (5, looped(2), 100.0, 0.4, (4, 1)),
        (200, looped(2), 0.8, 0.4, (100, 100)),
        # 8.42 and 7.58 + 0.8 in place of 8 and 8.8; also where a rank owns several stages.
        (16, looped(2), 0.8, 0.42, (8.5, 7.5)),
        (16, v_shaped(2), 0.8, 0.42, (4, 4, 4.5, 3.5)),
        (16, looped(2, 3), 0.8, 0.42, (3, 3, 3, 3, 2.5, 1.5)),
        # With a V the first and the last stage lie on one rank, which gets fewer layers.
        (17, v_shaped(2), 1.0, 0.5, (4, 4, 5, 4)),
        (12, v_shaped(2), 4.0, 0.5, (3, 4, 4, 1)),
        # Ten layers on four ranks: all of them 2.4 or 2.6 long, not 3.
        (10, looped(4), 0.0, 0.4, (2.5, 2.5, 2.5, 2.5)),
        (5, looped(2), 0.0, 0.5, (2.5, 2.5)),
        # Half a layer on the last rank: 3.6, where a whole one takes 4.
        (10, looped(4), 3.0, 0.4, (3, 3, 3.5, 0.5)),
        # Fewer layers than stages.
        (4, looped(8), 0.5, 0.4, (0.5,) * 8),
        (5, looped(8), 0.5, 0.4, (1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5)),
        (1, looped(1, 2), 0.5, 0.4, (0.5, 0.5)),
    ],
)
def test_splits_by_hand(
    layers: int, owners: tuple[int, ...], head: float, attention: float, want: tuple[float, ...]
) -> None:
    split = balanced_blocks(layers, owners, head, attention)
    assert tuple(count / 2 for count in split) == want


@pytest.mark.parametrize("split", [(1, 2, 1), (2, 1, 1), (1, 1, 2), (1.5, 1.5, 1), (0.5, 3, 0.5)])
def test_explicit_layers_are_taken_as_they_are(split: tuple[float, ...]) -> None:
    specs = stage_specs(resolve(Config().replace(num_layers=4, pp=3, pp_layers=split)))
    assert tuple(spec.num_layers for spec in specs) == split
    assert [spec.first_block / 2 for spec in specs] == [0, split[0], split[0] + split[1]]
    assert [(s.has_embedding, s.has_head) for s in specs] == [
        *((True, False), (False, False), (False, True))
    ]


@pytest.mark.parametrize(
    ("first", "blocks", "parts", "words"),
    [
        (0, 4, [(0, True, True), (1, True, True)], "layers 0-1"),
        (0, 3, [(0, True, True), (1, True, False)], "layer 0 and attention of 1"),
        (3, 3, [(1, False, True), (2, True, True)], "MLP of 1 and layer 2"),
        (3, 2, [(1, False, True), (2, True, False)], "MLP of 1 and attention of 2"),
        (
            3,
            6,
            [(1, False, True), (2, True, True), (3, True, True), (4, True, False)],
            "MLP of 1, layers 2-3 and attention of 4",
        ),
        (6, 1, [(3, True, False)], "attention of 3"),
        (7, 1, [(3, False, True)], "MLP of 3"),
    ],
)
def test_parts_of_a_stage(
    first: int, blocks: int, parts: list[tuple[int, bool, bool]], words: str
) -> None:
    spec = StageSpec(1, first, blocks, has_embedding=False, has_head=False)
    assert spec.parts == tuple(LayerPart(*part) for part in parts)
    assert spec.words() == words
    whole = StageSpec(0, first, blocks, has_embedding=True, has_head=True)
    assert whole.words() == f"embedding, {words}, head"


def test_costs_by_hand() -> None:
    """Multiplications per token: head 8 x 100; layer 8 (4 + 2 x 2 + 4 + 3 x 10) + scores 4 x 6."""
    config = resolve(
        Config().replace(
            **dict(hidden_size=8, num_attention_heads=2, num_kv_heads=1, head_dim=2, seq_length=6),
            **dict(ffn_hidden_size=10, vocab_size=100),
        )
    )
    attention = 8 * (2 * 2 + 2 * 1 * 2) + 8 * 4 + 4 * 6
    layer = attention + 3 * 8 * 10
    assert head_cost_in_layers(config) == pytest.approx(800 / layer, rel=1e-15)
    assert attention_cost_in_layers(config) == pytest.approx(attention / layer, rel=1e-15)


def test_the_head_of_a_preset() -> None:
    """128256 x 4096 over 4096 (6144 + 4096 + 3 x 14336) + 4096 x 8192 multiplications.

    The head costs 2.09 layers and an attention 0.3: 8.79 for the last of (8.5, 8.5, 8.5, 6.5), and
    9 for the second of (8, 9, 9, 6).
    """
    config = resolve(Config().replace(pp=4, **PRESETS["llama3-8b"]))
    assert head_cost_in_layers(config) == pytest.approx(128256 / 61440, rel=1e-15)
    assert attention_cost_in_layers(config) == pytest.approx(18432 / 61440, rel=1e-15)
    assert tuple(spec.num_layers for spec in stage_specs(config)) == (8.5, 8.5, 8.5, 6.5)


def test_the_opening_says_what_each_rank_owns() -> None:
    config = resolve(
        Config().replace(num_layers=4, pp=2, schedule="zb-v", pp_layers=(0.5, 1, 1.5, 1))
    )
    text = opening(config, version="", device="", back_ends=None, data="", folder="")
    first, second = text.splitlines()[-3:-1]
    assert "  embedding, attention of 0 + layer 3, head           " in first
    assert "  MLP of 0 and attention of 1 + MLP of 1 and layer 2  " in second
