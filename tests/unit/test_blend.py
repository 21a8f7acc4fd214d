"""The interleave of a blend is Megatron-LM's, can be continued anywhere, and takes every sample of
datasets without weights once an epoch."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import megatron_semantics
import numpy as np
import pytest

from megalite.data import blended_samples
from megalite.data.blend import Greedy, compiler, normalized
from megalite.data.blended_samples import BlendedSamples, interleave
from megalite.data.index_cache import IndexCache
from megalite.data.samples import MockSamples, sample_order
from megalite.errors import DataError


@pytest.fixture(scope="module")
def helpers() -> Any:
    """megatron-core's compiled builders."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("megatron.core.datasets.helpers_cpp")


@pytest.fixture(scope="module")
def numba_loop() -> Any:
    pytest.importorskip("numba")
    return compiler()


def test_golden_vector() -> None:
    datasets, samples = Greedy([0.7, 0.3]).extend(10)
    assert datasets.tolist() == [0, 1, 0, 0, 1, 0, 0, 1, 0, 0]
    assert samples.tolist() == [0, 0, 1, 2, 1, 3, 4, 2, 5, 6]
    assert (datasets.dtype, samples.dtype) == (np.int16, np.int64)


def random_weights(number: int) -> list[float]:
    draw = random.Random(number)
    kinds = (lambda: draw.random() + 1e-3, lambda: float(draw.randint(1, 4)), lambda: 1.0)
    kind = draw.choice(kinds)
    return [kind() for _ in range(draw.randint(1, 8))]


def check_blend(number: int, size: int = 300) -> None:
    weights = random_weights(number)
    datasets, samples = Greedy(weights).extend(size)
    want = megatron_semantics.blend(normalized(weights), size)
    assert (datasets.tolist(), samples.tolist()) == want, weights


def check_exhaustive(number: int) -> None:
    draw = random.Random(number)
    sizes = [draw.randint(1, 40) for _ in range(draw.randint(1, 8))]
    datasets, samples = Greedy(sizes, sizes).extend(sum(sizes))
    assert (datasets.tolist(), samples.tolist()) == megatron_semantics.exhaustive_blend(sizes)
    for dataset, size in enumerate(sizes):
        assert samples[datasets == dataset].tolist() == list(range(size)), "each once, in order"


def test_random_blends_equal_plain_loops() -> None:
    for number in range(100):
        check_blend(number)
        check_exhaustive(number)


@pytest.mark.full
def test_ten_thousand_random_blends_equal_plain_loops() -> None:
    for number in range(10_000):
        check_blend(number, 60)
        check_exhaustive(number)


def test_random_blends_equal_megatron_core(helpers: Any) -> None:
    for number in range(100):
        weights = normalized(random_weights(number))
        theirs = np.zeros(5000, np.int16), np.zeros(5000, np.int64)
        helpers.build_blending_indices(*theirs, weights, len(weights), 5000, False)
        # Dividing by a sum that is not exactly 1 would round once more.
        greedy = Greedy(weights)
        greedy.weights = weights
        for ours, other in zip(greedy.extend(5000), theirs, strict=True):
            assert (ours == other).all() and ours.dtype == other.dtype
        sizes = [random.Random(number + i).randint(1, 200) for i in range(1 + number % 8)]
        theirs = np.zeros(sum(sizes), np.int16), np.zeros(sum(sizes), np.int64)
        helpers.build_exhaustive_blending_indices(*theirs, sizes, len(sizes))
        for ours, other in zip(Greedy(sizes, sizes).extend(sum(sizes)), theirs, strict=True):
            assert (ours == other).all()


def test_numba_gives_the_same(numba_loop: Any) -> None:
    for number in range(30):
        weights = random_weights(number)
        for sizes in (None, [500] * len(weights)):
            count = 2000 if sizes is None else sum(sizes)
            plain = Greedy(weights, sizes)
            compiled = Greedy(weights, sizes, compiled=numba_loop)
            for part in (1, 7, count - 8):
                for ours, theirs in zip(compiled.extend(part), plain.extend(part), strict=True):
                    assert ours.dtype == theirs.dtype and (ours == theirs).all()
            assert plain.used == compiled.used


def test_a_blend_can_be_continued_anywhere() -> None:
    whole = Greedy([5, 3, 1.5]).extend(1000)
    for cut in (0, 1, 2, 333, 999, 1000):
        first = Greedy([5, 3, 1.5]).extend(cut)
        used = np.bincount(first[0], minlength=3).tolist()
        rest = Greedy([5, 3, 1.5], used=used).extend(1000 - cut)
        for i in (0, 1):
            assert np.concatenate([first[i], rest[i]]).tolist() == whole[i].tolist()


def test_the_cache_is_continued_and_not_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    extend = Greedy.extend

    def counted(self: Greedy, count: int) -> Any:
        counts.append(count)
        return extend(self, count)

    monkeypatch.setattr(Greedy, "extend", counted)
    cache = IndexCache(tmp_path)
    short = interleave([2, 1], None, 100, cache)
    long = interleave([2, 1], None, 250, cache)
    again = interleave([2, 1], None, 180, cache)
    interleave([1, 2], None, 10, cache)
    assert counts == [100, 150, 10]
    want = extend(Greedy([2, 1]), 250)
    for i in (0, 1):
        assert short[i].tolist() == want[i][:100].tolist()
        assert long[i].tolist() == again[i].tolist() == want[i].tolist()


def test_long_blends_are_compiled_if_numba_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numba_loop: Any
) -> None:
    monkeypatch.setattr(blended_samples, "WORTH_COMPILING", 50)
    monkeypatch.setattr(blended_samples, "compiler", lambda: numba_loop)
    compiled = interleave([3, 2], None, 500, IndexCache(tmp_path))
    assert compiled[0].tolist() == Greedy([3, 2]).extend(500)[0].tolist()


# Samples


class Sized(MockSamples):
    """A dataset of some size; its samples are told by seed and number."""

    def __init__(self, num_samples: int, seed: int):
        super().__init__(4, 1000, seed)
        self.num_samples = num_samples


PARTS = [Sized(7, 1), Sized(20, 2), Sized(3, 3)]


def test_without_weights_each_sample_comes_once_an_epoch(tmp_path: Path) -> None:
    blend = BlendedSamples(PARTS, None, 90, IndexCache(tmp_path))
    assert blend.num_samples == 30
    numbers = blend.order(np.arange(90)).reshape(3, 30)
    assert (numbers // 30 == np.arange(3)[:, None]).all(), "counted over all epochs"
    epochs = numbers % 30
    for epoch in epochs:
        assert sorted(epoch) == list(range(30))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3, "in another order each time"
    # Within an epoch a part's samples come in its own order of that epoch.
    for number, epoch in enumerate(epochs):
        own = epoch[(epoch >= 7) & (epoch < 27)] - 7
        assert own.tolist() == (sample_order(np.arange(20) + 20 * number, 20, 2) % 20).tolist()


def test_with_weights_each_part_begins_anew_by_itself(tmp_path: Path) -> None:
    blend = BlendedSamples(PARTS, [0.5, 0.25, 0.25], 400, IndexCache(tmp_path))
    counted = blend.order(np.arange(400))
    rounds, numbers = np.divmod(counted, 30)
    counts = np.bincount(np.searchsorted([7, 27], numbers, side="right"))
    assert counts.tolist() == [200, 100, 100]
    for first, part in zip((0, 7, 27), PARTS, strict=True):
        here = (numbers >= first) & (numbers < first + part.num_samples)
        own = rounds[here] * part.num_samples + numbers[here] - first
        assert own.tolist() == part.order(np.arange(len(own))).tolist()
        for number, within in zip(counted[here][:50], own, strict=False):
            assert (blend.read(int(number)) == part.read(int(within))).all()
    repeated = [i for i in range(401) if len(set(numbers[:i].tolist())) == i]
    assert blend.num_samples == max(repeated), "until the first sample comes again"


@pytest.mark.parametrize("weights", [None, [0.5, 0.25, 0.25]])
def test_a_blend_is_stable_under_the_length_of_the_run(
    tmp_path: Path, weights: list[float] | None
) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
    long = BlendedSamples(PARTS, weights, 200, IndexCache(tmp_path / "a"))
    for count in (1, 29, 30, 31, 100):
        short = BlendedSamples(PARTS, weights, count, IndexCache(tmp_path / "b"))
        places = np.arange(count)
        assert (short.order(places) == long.order(np.arange(200))[:count]).all()


def test_samples_are_read_from_the_part_they_belong_to(tmp_path: Path) -> None:
    blend = BlendedSamples(PARTS, None, 30, IndexCache(tmp_path))
    for number, (part, within) in {
        0: (0, 0),
        6: (0, 6),
        7: (1, 0),
        26: (1, 19),
        27: (2, 0),
    }.items():
        assert (blend.read(number) == PARTS[part].read(within)).all()


def test_more_datasets_than_an_int16_holds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="32767 are"):
        BlendedSamples([PARTS[0]] * 32768, None, 5, IndexCache(tmp_path))
