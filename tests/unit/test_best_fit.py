"""Best-fit packing cuts no document that fits, leaves as little room as best-fit-decreasing one by
one, and has every pair of neighbouring tokens of a document in exactly one sample."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest

from megalite.data.best_fit import Packing, pack, plan, remainders


def one_by_one(lengths: list[int], places: int) -> list[int]:
    """Best-fit-decreasing as it is defined; the room left in each bin, in order."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        at = bisect_left(rooms, length)
        room = rooms.pop(at) if at < len(rooms) else places
        insort(rooms, room - length)
    return rooms


def in_blocks(lengths: np.ndarray, size: int) -> Callable[[], Iterator[np.ndarray]]:
    return lambda: (lengths[i : i + size] for i in range(0, len(lengths), size))


def samples_of(packing: Packing, lengths: np.ndarray, seq: int) -> list[list[tuple[int, int]]]:
    """The spans of tokens of each sample; documents stand one after the other from token 0."""
    ends = np.cumsum(lengths)
    _, rest = remainders(lengths, seq)
    packed = [
        [(int(ends[d] - rest[d]), int(ends[d])) for d in packing.documents[a:b].tolist()]
        for a, b in pairwise(packing.firsts.tolist())
    ]
    return packed + [[(start, start + seq + 1)] for start in packing.whole.tolist()]


def check_packing(lengths: np.ndarray, seq: int, block: int) -> None:
    packing = pack(in_blocks(lengths, block), seq)
    samples = samples_of(packing, lengths, seq)
    sizes = [sum(stop - start for start, stop in spans) for spans in samples]
    assert max(sizes, default=0) <= seq + 1
    # As many bins with each room left as the definition leaves.
    _, rest = remainders(lengths, seq)
    rooms = one_by_one(rest[rest > 0].tolist(), seq + 1)
    assert sorted(seq + 1 - size for size in sizes[: len(packing.firsts) - 1]) == rooms
    assert packing.num_tokens == sum(sizes)
    # Every pair of neighbours of a document, and no other, is in one sample.
    pairs = Counter(t for spans in samples for start, stop in spans for t in range(start, stop - 1))
    ends = np.cumsum(lengths)
    wanted = set(range(int(ends[-1]) if len(ends) else 0)) - set((ends - 1).tolist())
    assert pairs == Counter(wanted)
    # What fits is whole; what does not is cut as little as can be.
    spans_of = Counter(
        int(np.searchsorted(ends, start, side="right")) for spans in samples for start, _ in spans
    )
    for document, length in enumerate(lengths.tolist()):
        needed = -(-(length - 1) // seq) if length > 1 else 0
        assert spans_of[document] == needed
    assert packing.num_cut == sum(count > 1 for count in spans_of.values())


def random_case(seed: int) -> None:
    draw = np.random.default_rng(seed)
    seq = int(draw.integers(1, 60))
    count = int(draw.integers(0, 120))
    kind = draw.integers(0, 3)
    if kind == 0:
        lengths = draw.integers(0, draw.integers(2, 4 * seq + 3), count)
    elif kind == 1:  # few different lengths
        lengths = draw.choice(draw.integers(0, 2 * seq + 3, 4), count)
    else:
        lengths = np.minimum(draw.lognormal(1.5, 1.2, count), 8 * seq).astype(np.int64)
    check_packing(lengths.astype(np.int32), seq, int(draw.integers(1, 150)))


@pytest.mark.parametrize("hundred", range(3))
def test_packing_is_best_fit_decreasing(hundred: int) -> None:
    for seed in range(100 * hundred, 100 * hundred + 100):
        random_case(seed)


@pytest.mark.full
@pytest.mark.parametrize("thousand", range(10))
def test_packing_is_best_fit_decreasing_ten_thousand_times(thousand: int) -> None:
    for seed in range(1000 + 1000 * thousand, 2000 + 1000 * thousand):
        random_case(seed)


def test_packing_by_hand() -> None:
    """Ten places: 9 alone (nothing has length 1), 7 + 3, 6 + 4, 5 + 5, 4 + 3 + 3, 2."""
    lengths = np.array([3, 4, 9, 5, 3, 7, 2, 5, 6, 4, 3])
    packing = pack(in_blocks(lengths, 4), 9)
    found = [
        sorted(lengths[packing.documents[a:b]].tolist(), reverse=True)
        for a, b in pairwise(packing.firsts.tolist())
    ]
    assert sorted(found, reverse=True) == [[9], [7, 3], [6, 4], [5, 5], [4, 3, 3], [2]]
    assert (packing.num_cut, len(packing.whole)) == (0, 0)


def test_documents_longer_than_a_sample() -> None:
    """Of 5 places: neighbouring parts share a token, and the remainder is packed."""
    lengths = np.array([5, 9, 11, 2, 6, 1, 0])
    packing = pack(in_blocks(lengths, 3), 4)
    # 9 = 5 + 4 new ones; 11 = 5 + 4 + a remainder of 2 + 1; 6 = 5 + a remainder of 1 + 1.
    assert packing.whole.tolist() == [0, 5, 9, 14, 18, 27]
    assert remainders(lengths, 4)[1].tolist() == [0, 0, 3, 2, 2, 0, 0]
    assert [sorted(x) for x in np.split(packing.documents, packing.firsts[1:-1])] == [[2, 3], [4]]
    assert packing.num_cut == 3


def test_the_plan_takes_few_steps() -> None:
    """Some for each length, however many items there are: no loop over documents."""
    counts = np.random.default_rng(0).integers(0, 10**9, 4098)
    counts[0] = 0
    for many in (1, 10**6, 10**9):
        assert len(plan(counts // (10**9 // many)).each) < 2 * 4098


def test_a_million_documents_of_any_length() -> None:
    """More lengths than 16 bits hold, and documents of more than a block."""
    lengths = (np.random.default_rng(1).lognormal(6, 1.5, 300_000) + 1).astype(np.int32)
    packing = pack(in_blocks(lengths, 70_001), 100_000)
    whole, rest = remainders(lengths, 100_000)
    assert len(packing.whole) == whole.sum()
    assert sorted(packing.documents.tolist()) == np.flatnonzero(rest).tolist()
    sizes = np.add.reduceat(rest[packing.documents], packing.firsts[:-1])
    assert sizes.max() <= 100_001
    assert len(sizes) - 1 < rest.sum() / 100_001 + 1, "one more sample than there must be at most"


def test_the_packing_of_a_seed_never_changes() -> None:
    lengths = np.random.default_rng(7).integers(0, 300, 5000)
    packing = pack(in_blocks(lengths, 999), 128)
    content = b"".join(
        array.astype("<i8").tobytes()
        for array in (packing.documents, packing.firsts, packing.whole)
    )
    assert hashlib.sha256(content).hexdigest()[:16] == "25a945d636047b23"
    again = pack(in_blocks(lengths, 123), 128)
    assert again.documents.tolist() == packing.documents.tolist(), "whatever the blocks"
