"""The order is a bijection that any position has by itself; samples tile a split's tokens; splits
are cut where Megatron-LM cuts them."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megalite.config import Config, resolve
from megalite.data.corpus import Corpus
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.mixture import Mixture, Part
from megalite.data.permutation import permute
from megalite.data.samples import MockSamples, StreamSamples, sample_order
from megalite.data.splits import open_samples, split_bounds
from megalite.data.token_store import TokenStore
from megalite.errors import DataError

# The permutation


def whole(size: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return permute(np.arange(size), size, seed, epoch)


@pytest.mark.parametrize("seed", [0, 1234, 2**63 + 5])
def test_small_permutations_are_bijections(seed: int) -> None:
    for size in range(1, 301):
        for epoch in (0, 1):
            assert sorted(whole(size, seed, epoch)) == list(range(size)), (size, epoch)


@pytest.mark.parametrize("size", [4**9 - 1, 4**9, 4**9 + 1, 1_000_003, 3_000_000])
def test_large_permutations_are_bijections(size: int) -> None:
    counts = np.bincount(whole(size, 7, 2), minlength=size)
    assert len(counts) == size
    assert counts.min() == counts.max() == 1


@pytest.mark.parametrize("size", [(1 << 40), (1 << 40) + 1, (1 << 61) - 1, 1 << 62])
def test_huge_permutations_stay_inside_and_do_not_collide(size: int) -> None:
    places = np.linspace(0, size - 1, 100_001, dtype=np.float64).astype(np.int64)
    places = np.unique(np.minimum(places, size - 1))
    images = permute(places, size, 3, 0)
    assert images.dtype == np.int64
    assert images.min() >= 0 and images.max() < size
    assert len(np.unique(images)) == len(places)


@pytest.mark.parametrize("size", [17, 1000, 70_000])
def test_seeds_and_epochs_give_unrelated_orders(size: int) -> None:
    """Two random orders agree at one place on average, at more than six once in 10,000."""
    keys = [(seed, epoch) for seed in (0, 1, 2, 1234) for epoch in (0, 1, 2)]
    orders = [whole(size, seed, epoch) for seed, epoch in keys]
    orders.append(np.arange(size))
    agree = [int((a == b).sum()) for i, a in enumerate(orders) for b in orders[:i]]
    assert max(agree) <= 6
    assert 0.5 < np.mean(agree) < 1.6


@pytest.mark.parametrize("size", [1, 2, 5, 64, 65, 999])
def test_an_image_does_not_depend_on_its_company(size: int) -> None:
    all_at_once = whole(size, 5, 1)
    one_by_one = [int(permute(np.array([i]), size, 5, 1)[0]) for i in range(size)]
    assert all_at_once.tolist() == one_by_one
    shuffled = np.random.default_rng(0).permutation(size)
    assert permute(shuffled, size, 5, 1).tolist() == all_at_once[shuffled].tolist()
    table = np.stack([shuffled, shuffled[::-1]])
    assert (permute(table, size, 5, 1) == all_at_once[table]).all()
    repeated = np.array([0, 0, size - 1])
    assert permute(repeated, size, 5, 1).tolist() == all_at_once[repeated].tolist()


def test_a_place_may_have_no_dims() -> None:
    assert int(permute(np.array(8), 9, 5, 1)) == whole(9, 5, 1)[8]


def test_positions_are_not_changed_in_place() -> None:
    places = np.arange(10)
    permute(places, 10, 1, 0)
    assert places.tolist() == list(range(10))


def test_images_of_a_place_are_uniform_over_seeds_and_epochs() -> None:
    """Chi-square of 12 values from 2,400 keys: above 31.3 once in 1,000."""
    for place in (0, 5, 11):
        keys = [(seed, epoch) for seed in range(600) for epoch in range(4)]
        images = [int(permute(np.array([place]), 12, seed, epoch)[0]) for seed, epoch in keys]
        counts = np.bincount(images, minlength=12)
        assert ((counts - 200) ** 2 / 200).sum() < 31.3


def test_neighbours_go_anywhere() -> None:
    """Correlation of place and image, and of neighbours' images: both are near 0."""
    images = whole(100_000, 1, 0).astype(float)
    limit = 4 / math.sqrt(len(images))
    assert abs(np.corrcoef(np.arange(len(images)), images)[0, 1]) < limit
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < limit
    quarter = whole(100_000, 1, 0)[:25_000]
    shares = np.bincount(quarter // 10_000, minlength=10) / 25_000
    assert np.abs(shares - 0.1).max() < 0.01


# Samples of a stream


def store(tokens: np.ndarray, vocab: int, name: str) -> TokenStore:
    reader = SimpleNamespace(dtype=tokens.dtype, read=lambda start, stop: tokens[start:stop])
    return TokenStore(reader, name, vocab)


def stream(tokens: int, start: int, stop: int, seq: int, vocab: int = 10_000) -> StreamSamples:
    whole = store(np.arange(tokens, dtype=np.uint16), vocab, "stream")
    return StreamSamples(whole, start, stop, seq, seed=0)


@pytest.mark.parametrize(
    ("start", "stop", "seq", "count"),
    [
        *((0, 0, 4, 0), (0, 1, 4, 0), (0, 4, 4, 0), (0, 5, 4, 1), (0, 8, 4, 1), (0, 9, 4, 2)),
        *(
            (3, 8, 4, 1),
            (3, 7, 4, 0),
            (50, 100, 7, 7),
            (50, 99, 7, 6),
            (0, 100, 1, 99),
            (9, 9, 1, 0),
        ),
    ],
)
def test_samples_tile_their_part(start: int, stop: int, seq: int, count: int) -> None:
    samples = stream(100, start, stop, seq)
    assert samples.num_samples == count
    read = [samples.read(i) for i in range(count)]
    for i, sample in enumerate(read):
        assert sample.dtype == np.int64
        assert sample.tolist() == list(range(start + i * seq, start + i * seq + seq + 1))
        assert sample[-1] < stop, "the last token is inside the part"
    assert all(a[-1] == b[0] for a, b in pairwise(read))
    left_over = stop - start - 1 - count * seq
    assert left_over < seq, "one more would not have fitted"


@pytest.mark.parametrize(
    ("tokens", "dtype", "wrong"),
    [([3, 9, 10, 4], "<u2", 10), ([3, 65535, 2, 4], "<u2", 65535), ([3, -2, 1, 4], "<i4", -2)],
)
def test_a_token_outside_the_vocabulary_is_named(tokens: list[int], dtype: str, wrong: int) -> None:
    content = np.array([0, 1, 2, *tokens, 1], dtype)
    samples = StreamSamples(store(content, 10, "corpus.bin"), 1, 8, 2, seed=0)
    assert samples.read(0).tolist() == [1, 2, 3]
    with pytest.raises(DataError) as caught:
        samples.read(1)
    (sentence,) = caught.value.violations
    assert sentence == f"corpus.bin: token id {wrong} near token 3 is outside --vocab-size 10"


def test_random_tokens_depend_on_seed_and_number_alone() -> None:
    samples = MockSamples(50, 7, seed=3)
    first = samples.read(123_456_789_012)
    assert first.shape == (51,) and first.dtype == np.int64
    assert (samples.read(123_456_789_012) == first).all()
    assert not (samples.read(5) == first).all()
    assert not (MockSamples(50, 7, seed=4).read(123_456_789_012) == first).all()
    many = np.concatenate([samples.read(i) for i in range(200)])
    counts = np.bincount(many, minlength=7)
    assert len(counts) == 7
    assert np.abs(counts / len(many) - 1 / 7).max() < 0.02


# Splits


def plain(split: str, count: int) -> list[tuple[int, int]]:
    """The shares in exact arithmetic; Python rounds halves to even."""
    shares = [Fraction(part) for part in split.split(",")]
    marks = [round(sum(shares[:i]) / sum(shares) * count) for i in range(len(shares) + 1)]
    return list(pairwise(marks))


def megatron(split: str, count: int) -> list[tuple[int, int]]:
    """Megatron-LM: shares over their sum, added up, times the count, rounded."""
    shares = [float(part) for part in split.split(",")]
    marks, mark = [0], 0.0
    for share in (np.array(shares) / np.sum(shares)).tolist():
        mark += share
        marks.append(round(mark * float(count)))
    return list(pairwise(marks))


@pytest.mark.parametrize("reference", [plain, megatron])
@pytest.mark.parametrize("split", ["95,5", "969,30,1", "99,1", "1,1", "1,1,1", "1,0", "980,10,10"])
def test_splits_are_cut_where_megatron_cuts_them(split: str, reference: object) -> None:
    assert callable(reference)
    for count in [*range(3000), 10_000, 123_456, 99_999_999]:
        assert split_bounds(split, count) == reference(split, count), count


@pytest.mark.parametrize("split", ["900,50,50", "70,20,10", "0.7,0.2,0.1"])
def test_ties_of_three_shares_are_broken_as_megatron_breaks_them(split: str) -> None:
    for count in range(3000):
        assert split_bounds(split, count) == megatron(split, count), count


@pytest.mark.parametrize(
    ("split", "count", "want"),
    [
        ("969,30,1", 1000, [(0, 969), (969, 999), (999, 1000)]),
        ("969,30,1", 100, [(0, 97), (97, 100), (100, 100)]),
        ("969,30,1", 500, [(0, 484), (484, 500), (500, 500)]),  # 484.5 and 499.5: to even
        ("95,5", 10, [(0, 10), (10, 10)]),  # 9.5: to even
        ("95,5", 30, [(0, 28), (28, 30)]),  # 28.5: to even
        ("95,5", 100, [(0, 95), (95, 100)]),
        ("1,1", 3, [(0, 2), (2, 3)]),
        ("1,1", 5, [(0, 2), (2, 5)]),
        (" 3 , 1 ", 8, [(0, 6), (6, 8)]),
        ("1,0", 7, [(0, 7), (7, 7)]),
        ("95,5", 0, [(0, 0), (0, 0)]),
    ],
)
def test_splits_by_hand(split: str, count: int, want: list[tuple[int, int]]) -> None:
    assert split_bounds(split, count) == want


# Order over epochs


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_the_order_runs_through_epochs(size: int) -> None:
    numbers = sample_order(np.arange(5 * size), size, seed=11).reshape(5, size)
    assert (numbers // size == np.arange(5)[:, None]).all(), "counted over all epochs"
    order = numbers % size
    for epoch in range(5):
        assert sorted(order[epoch]) == list(range(size))
        assert order[epoch].tolist() == whole(size, 11, epoch).tolist()
    if size == 100:
        assert len({tuple(row) for row in order.tolist()}) == 5


def test_a_place_does_not_depend_on_what_is_asked_with_it() -> None:
    """Neither on the length of the run, nor on the batch that crosses an epoch."""
    long = sample_order(np.arange(1000), 37, seed=2)
    for length in (1, 36, 37, 38, 75, 999):
        assert (sample_order(np.arange(length), 37, seed=2) == long[:length]).all()
    crossing = np.array([[36, 37], [111, 110]])
    assert (sample_order(crossing, 37, seed=2) == long[crossing]).all()
    assert not (sample_order(np.arange(1000), 37, seed=3) == long).all()


# Opening a corpus


def indexed_corpus(folder: Path, lengths: list[int], max_token: int = 256) -> Mixture:
    """Token i of the stream is i % 251."""
    prefix = folder / "corpus"
    writer = IndexedWriter(prefix, np.dtype("<u2"))
    first = 0
    for length in lengths:
        writer.add_sequence(np.arange(first, first + length) % 251)
        writer.end_document()
        first += length
    writer.close()
    corpus = Corpus(str(prefix), "my corpus", "f", len(lengths), first, max_token)
    return Mixture((Part(corpus),))


def settings(**values: object) -> Config:
    return resolve(Config().replace(steps=1, **values))


def test_shares_of_a_corpus_are_whole_sequences(tmp_path: Path) -> None:
    corpus = indexed_corpus(tmp_path, [30, 10, 25, 35])
    train, valid, _ = open_samples(settings(split="75,25", seq_length=8), corpus)
    assert (train.num_samples, valid.num_samples) == (64 // 8, 34 // 8)
    assert train.read(7).tolist() == list(range(56, 65)), "65 tokens: the last one is a label"
    assert valid.read(0).tolist() == list(range(65, 74))
    _, left, _ = open_samples(settings(split="1,2,1", seq_length=8), corpus)
    assert (left.num_samples, left.read(0)[0]) == (34 // 8, 30)


@pytest.mark.parametrize(
    ("lengths", "values", "found"),
    [
        ([8, 92], dict(split="1,1"), "the training share of --split 1,1 holds 8 tokens"),
        ([92, 8], dict(split="1,1"), "the validation share of --split 1,1 holds 8 tokens"),
        ([100], dict(split="95,5"), "the validation share of --split 95,5 holds 0 tokens"),
        ([], dict(split="95,5"), "the training share of --split 95,5 holds 0 tokens"),
    ],
)
def test_a_share_shorter_than_a_sample_is_named(
    tmp_path: Path, lengths: list[int], values: dict, found: str
) -> None:
    corpus = indexed_corpus(tmp_path, lengths)
    with pytest.raises(DataError) as caught:
        open_samples(settings(seq_length=8, **values), corpus)
    (sentence,) = caught.value.violations
    assert sentence.startswith(
        f"my corpus: {found}, fewer than one sample of --seq-length 8 + 1: give more text, "
        "a shorter --seq-length or another --split"
    )
    assert ("--eval-steps 0" in sentence) == ("validation" in found)


def test_without_validations_the_validation_share_may_be_empty(tmp_path: Path) -> None:
    corpus = indexed_corpus(tmp_path, [100])
    train, valid, _ = open_samples(settings(seq_length=8, eval_steps=0), corpus)
    assert (train.num_samples, valid.num_samples) == (99 // 8, 0)


def test_one_sample_in_each_share_is_enough(tmp_path: Path) -> None:
    corpus = indexed_corpus(tmp_path, [9, 9])
    train, valid, _ = open_samples(settings(seq_length=8, split="1,1"), corpus)
    assert (train.num_samples, valid.num_samples) == (1, 1)
    assert valid.read(0).tolist() == list(range(9, 18))


def test_a_corpus_of_a_larger_vocabulary_is_refused(tmp_path: Path) -> None:
    corpus = indexed_corpus(tmp_path, [100, 100], max_token=257)
    with pytest.raises(DataError) as caught:
        open_samples(settings(seq_length=8, split="1,1"), corpus)
    assert caught.value.violations == [
        "my corpus holds token id 257, but --vocab-size is 257: give the size of its tokenizer"
    ]
    open_samples(settings(seq_length=8, split="1,1", vocab_size=258), corpus)


def test_random_tokens_of_training_and_validation_differ() -> None:
    corpus = Mixture((Part(Corpus("", "random tokens", "mock", 0, 0, 0)),))
    config = settings(mock_data=True, vocab_size=1000, seq_length=16)
    train, valid, _ = open_samples(config, corpus)
    assert train.num_samples == valid.num_samples > 1 << 32
    assert not (train.read(0) == valid.read(0)).all()
    assert max(train.read(i).max() for i in range(100)) < 1000
