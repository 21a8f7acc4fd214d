"""How a model's blocks are shared out among pipeline stages by default. No torch import.

A layer is two blocks, attention and then MLP, and costs 1; `attention` of that is the first one's.
A stage with an odd number of blocks begins or ends inside a layer, so the stages with odd numbers
are, in order, by turns too long by an attention and by an MLP: one ends after the attention of a
layer, the next odd one begins with that layer's MLP.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

WORTH_A_HALF = 0.99
"""A layer is cut in two if the slowest rank then takes at most this share of its time."""


def balanced_blocks(
    num_layers: int, stage_rank: Sequence[int], head: float, attention: float
) -> tuple[int, ...]:
    """Blocks per stage that make the slowest rank as fast as possible.

    A rank takes the time of all its stages; the last stage also computes the head and the loss, and
    the embedding is a lookup that costs nothing. Among equals the stages are as even as possible,
    since a stage that takes longer than others makes them wait within the schedule. Layers left
    over go to late stages, because the early ones keep the most micro-batches alive.

    Layers stay whole unless halves make the slowest rank faster by more than 1%, or there are fewer
    layers than stages.

    Args:
        num_layers: of the model, at least half as many as stages.
        stage_rank: pipeline rank of each stage.
        head: cost of the head and the loss, in layers.
        attention: cost of an attention block, in layers; an MLP costs the rest.
    """
    shape = _Shape(num_layers, tuple(stage_rank), head, attention)
    whole, best = _share_out(shape, frozenset()), _with_halves(shape)
    if best is None or (whole is not None and best.slowest >= WORTH_A_HALF * whole.slowest):
        best = whole
    assert best is not None, "fewer blocks than stages"
    return best.blocks


@dataclass(frozen=True)
class _Shape:
    """What is to be shared out: the arguments of `balanced_blocks`."""

    num_layers: int
    stage_rank: tuple[int, ...]
    head: float
    attention: float


@dataclass(frozen=True)
class _Split:
    """One way to share out the blocks.

    Attributes:
        slowest: time of the slowest rank.
        unevenness: sum of the squares of the stages' times.
        odd: the stages with an odd number of blocks.
        blocks: of each stage.
    """

    slowest: float
    unevenness: float
    odd: frozenset[int]
    blocks: tuple[int, ...]

    @property
    def badness(self) -> tuple[float, float]:
        """What a better split has less of."""
        return self.slowest, self.unevenness


def _with_halves(shape: _Shape) -> _Split | None:
    """A good split with halves, if there is one: the best of some, its boundaries then moved.

    A boundary that moves by half a layer makes an odd stage even, and the other way round. With one
    stage on each rank the result is the best there is; else a better one may be missed.
    """
    best = _best(shape, _odd_stages(shape))
    while best is not None:
        last = len(shape.stage_rank) - 1
        moved = _best(shape, (best.odd ^ {stage, stage + 1} for stage in range(last)))
        if moved is None or moved.badness >= best.badness:
            break
        best = moved
    return best


def _odd_stages(shape: _Shape) -> Iterator[frozenset[int]]:
    """Which stages may have an odd number of blocks: neighbours, by pairs.

    All ranks but the head's are alike. So it matters how many halves there are, and whether the
    head's rank has none, an MLP in its last stage, or an attention in its first one.
    """
    stages, ranks = len(shape.stage_rank), len(set(shape.stage_rank))
    needed = stages - shape.num_layers
    first_of_head = shape.stage_rank.index(shape.stage_rank[-1])
    for pairs in range(max(1, needed), max(ranks // 2, needed) + 1):
        for first in (first_of_head, stages - 1 - 2 * pairs, stages - 2 * pairs):
            if 0 <= first <= stages - 2 * pairs:
                yield frozenset(range(first, first + 2 * pairs))


def _best(shape: _Shape, odds: Iterable[frozenset[int]]) -> _Split | None:
    """The best split with one of these sets of odd stages."""
    splits = (_share_out(shape, odd) for odd in odds)
    possible = (split for split in splits if split is not None)
    return min(possible, key=lambda split: split.badness, default=None)


def _share_out(shape: _Shape, odd: frozenset[int]) -> _Split | None:
    """The best split in which these stages have odd numbers of blocks; None if there is none."""
    owners = shape.stage_rank
    # Whole layers of each stage, and what it has beside them.
    whole = [0 if stage in odd else 1 for stage in range(len(owners))]
    more = [0.0] * len(owners)
    for place, stage in enumerate(sorted(odd)):
        more[stage] = shape.attention if place % 2 == 0 else 1 - shape.attention
    more[-1] += shape.head
    left = shape.num_layers - len(odd) // 2 - sum(whole)
    if left < 0:
        return None
    room = _room(_loads(owners, [w + m for w, m in zip(whole, more, strict=True)]), left)
    # Each layer goes to the shortest stage: of all splits with this room none is more even.
    for _ in range(left):
        able = (stage for stage, rank in enumerate(owners) if room[rank])
        stage = min(able, key=lambda stage: (whole[stage] + more[stage], -stage))
        whole[stage] += 1
        room[owners[stage]] -= 1
    times = [w + m for w, m in zip(whole, more, strict=True)]
    return _Split(
        slowest=max(_loads(owners, times).values()),
        unevenness=sum(time**2 for time in times),
        odd=odd,
        blocks=tuple(2 * count + (stage in odd) for stage, count in enumerate(whole)),
    )


def _loads(stage_rank: Sequence[int], times: Sequence[float]) -> dict[int, float]:
    """Time of each rank, from its stages'."""
    loads = dict.fromkeys(stage_rank, 0.0)
    for rank, time in zip(stage_rank, times, strict=True):
        loads[rank] += time
    return loads


def _room(loads: Mapping[int, float], layers: int) -> dict[int, int]:
    """Layers that each rank can take without becoming slower than the slowest has to be.

    Args:
        loads: of each rank already.
        layers: to share out among them.
    """
    filled = dict(loads)
    for _ in range(layers):
        filled[min(filled, key=filled.__getitem__)] += 1
    slowest = max(filled.values()) + 1e-9  # sums of fractions may differ by their rounding
    return {rank: int(slowest - load) for rank, load in loads.items()}
