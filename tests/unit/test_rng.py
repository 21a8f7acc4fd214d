"""Random values are SplitMix64's, a function of key and place alone; the normal quantile is the
normal quantile; blocks of a matrix equal the whole's."""

from __future__ import annotations

import hashlib
import math
import random
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from megalite.parallel import rng
from megalite.parallel.rng import (
    keep_mask,
    make_key,
    normal,
    normal_quantile,
    normal_slice,
    random_bits,
    uniform,
)

MASK = (1 << 64) - 1
MILLION = torch.arange(1_000_000)


def splitmix64(state: int) -> int:
    """The output after `state`, in Python's integers."""
    x = (state + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def bits(key: int, index: int) -> int:
    """Element `index` of the sequence that starts at `key`, unsigned."""
    return splitmix64((key + index * 0x9E3779B97F4A7C15) & MASK)


KEYS = [0, 1, -1, 2**63 - 1, -(2**63), make_key(1234, "model.embed_tokens.weight")]
PLACES = [0, 1, 2, 1000, 2**31, 2**40 + 7, 2**62]


# Bits


def test_the_published_first_outputs_of_splitmix64() -> None:
    """Seed 1234567, as in the reference implementation's tests."""
    want = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [bits(1234567, i) for i in range(5)] == want
    got = random_bits(1234567, torch.arange(5)).tolist()
    assert [x & MASK for x in got] == want


@pytest.mark.parametrize("key", KEYS)
def test_bits_equal_python_integers(key: int) -> None:
    got = random_bits(key, torch.tensor(PLACES))
    assert got.dtype == torch.int64
    assert [x & MASK for x in got.tolist()] == [bits(key, i) for i in PLACES]


@pytest.mark.parametrize("key", KEYS)
def test_uniform_and_mask_equal_python_integers(key: int) -> None:
    want = [bits(key, i) for i in PLACES]
    got = uniform(key, torch.tensor(PLACES))
    assert got.dtype == torch.float64
    assert got.tolist() == [((x >> 12) + 0.5) / 2**52 for x in want]
    for drop in (0.0, 0.1, 0.5, 0.9):
        kept = keep_mask(key, torch.tensor(PLACES), drop).tolist()
        assert kept == [x >> 32 >= round(drop * 2**32) for x in want]


def test_key_by_hand() -> None:
    digest = hashlib.sha256(b"7\x1fw\x1f3").digest()
    assert make_key(7, "w", 3) == int.from_bytes(digest[:8], "little", signed=True)


def test_keys_differ_by_each_part_and_its_place() -> None:
    several = [(1, "a"), (2, "a"), (1, "b"), ("a", 1), (1, "a", 0), (1, "a0"), (12, 3), (1, 23)]
    keys = [make_key(*parts) for parts in several]
    assert len(set(keys)) == len(keys)
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert min(keys) < 0 < max(keys)


def test_shape_and_company_do_not_matter() -> None:
    flat = random_bits(5, torch.arange(60))
    assert (random_bits(5, torch.arange(60).view(3, 4, 5)) == flat.view(3, 4, 5)).all()
    some = torch.tensor([59, 0, 7, 7])
    assert (random_bits(5, some) == flat[some]).all()
    assert random_bits(5, torch.tensor(7)) == flat[7]
    strided = torch.arange(120)[::2]
    assert (normal(5, strided) == normal(5, torch.arange(120))[::2]).all()


# The normal quantile


def exact(p: list[float]) -> Tensor:
    return torch.tensor([NormalDist().inv_cdf(x) for x in p], dtype=torch.float64)


GRIDS = {
    "middle": [i / 4001 for i in range(1, 4001)],
    "either side of the central part": [c + d for c in (0.075, 0.925) for d in (-1e-9, 1e-9)],
    "lower tail": [10**-e for e in [1 + i / 100 for i in range(1400)]],
    "upper tail": [1 - 2**-e for e in range(1, 53)],
    "either side of the far tail": [math.exp(-25) * f for f in (0.99, 1 - 1e-9, 1 + 1e-9, 1.01)],
    "smallest and largest of `uniform`": [0.5 * 2**-52, 1 - 0.5 * 2**-52],
}


@pytest.mark.parametrize("grid", GRIDS)
def test_quantile(grid: str) -> None:
    p = GRIDS[grid]
    got, want = normal_quantile(torch.tensor(p, dtype=torch.float64)), exact(p)
    assert got.dtype == torch.float64
    assert ((got - want).abs() <= 1e-6 * want.abs()).all()


def test_quantile_is_odd_and_rises() -> None:
    p = torch.arange(1, 2**14, dtype=torch.float64) / 2**15  # 1 - p is exact
    low, high = normal_quantile(p), normal_quantile(1 - p)
    assert (low == -high).all()
    assert normal_quantile(torch.tensor([0.5], dtype=torch.float64)).item() == 0.0
    assert (torch.cat([low, high.flip(0)]).diff() > 0).all()


def test_logarithm_and_root() -> None:
    x = torch.cat([torch.logspace(-16, 0, 2000).double(), torch.linspace(1e-3, 1, 2000).double()])
    assert (rng._log(x) - torch.log(x)).abs().max() < 1e-9
    x = torch.linspace(0.5, 40, 4000, dtype=torch.float64)
    assert (rng._sqrt(x) - torch.sqrt(x)).abs().max() < 1e-14


# Distributions


def test_moments_of_a_million_normals() -> None:
    """Each within 4.5 standard errors."""
    x = normal(make_key("moments"), MILLION)
    root = math.sqrt(len(x))
    for power, mean, deviation in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((x**power).mean().item() - mean) < 4.5 * math.sqrt(deviation) / root, power
    for z in (-2.0, -1.0, 0.0, 0.5, 1.5, 3.0):
        share = NormalDist().cdf(z)
        error = math.sqrt(share * (1 - share)) / root
        assert abs((x < z).double().mean().item() - share) < 4.5 * error, z
    assert 4.0 < x.abs().max() < 6.5


def test_uniform_is_uniform_and_inside() -> None:
    u = uniform(make_key("uniform"), MILLION)
    assert 0.0 < u.min() < 1e-5
    assert 1 - 1e-5 < u.max() < 1.0
    counts = torch.histc(u, 100, 0.0, 1.0)
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 160.0  # chi-square, 99 degrees: 1 in 10,000


def test_every_bit_is_fair() -> None:
    x = random_bits(make_key("bits"), torch.arange(200_000))
    for bit in range(64):
        share = ((x >> bit) & 1).double().mean().item()
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(200_000), bit


@pytest.mark.parametrize("drop", [0.0, 1e-3, 0.1, 0.5, 0.9, 0.999])
def test_rate_of_a_mask(drop: float) -> None:
    kept = keep_mask(make_key("mask", str(drop)), MILLION, drop)
    assert kept.dtype == torch.bool
    error = math.sqrt(drop * (1 - drop) / len(MILLION))
    assert abs(kept.double().mean().item() - (1 - drop)) <= 4.5 * error
    assert drop or kept.all()


def test_a_mask_keeps_from_the_threshold_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rng, "random_bits", lambda key, index: index)
    bits = torch.tensor([(1 << 62) - 1, 1 << 62, -1, 0])  # a quarter of all values are below 2^62
    assert keep_mask(0, bits, 0.25).tolist() == [False, True, True, False]


def test_keys_and_neighbouring_places_are_uncorrelated() -> None:
    """Also keys that follow each other, and one key's sequence shifted by a place."""
    place = torch.arange(200_000)
    keys = [0, 1, make_key(1, "a"), make_key(1, "b"), make_key(2, "a")]
    rows = [normal(key, place) for key in keys] + [normal(0, place + 1), normal(0, place + 4096)]
    correlation = torch.corrcoef(torch.stack(rows))
    correlation.fill_diagonal_(0.0)
    assert correlation.abs().max() < 4.5 / math.sqrt(len(place))
    masks = torch.stack([keep_mask(key, place, 0.5).double() for key in keys])
    correlation = torch.corrcoef(masks).fill_diagonal_(0.0)
    assert correlation.abs().max() < 4.5 / math.sqrt(len(place))


# Blocks


def test_a_matrix_by_hand() -> None:
    """Row-major places; values to the last bit from integers and `inv_cdf` to 1e-6."""
    got = normal_slice(99, (3, 4), range(3), range(4))
    assert got.shape == (3, 4) and got.dtype == torch.float64
    want = exact([((bits(99, i) >> 12) + 0.5) / 2**52 for i in range(12)]).view(3, 4)
    assert ((got - want).abs() <= 1e-6 * want.abs()).all()
    assert (got == normal(99, torch.arange(12)).view(3, 4)).all()


@pytest.mark.parametrize("chunk", [1 << 20, 50, 1])
def test_any_block_equals_the_block_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """However many elements are drawn at a time."""
    whole = normal(7, torch.arange(37 * 23)).view(37, 23)
    draw = random.Random(0)
    blocks = [(range(37), range(23)), (range(37), range(5, 11)), (range(30, 37), range(23))]
    blocks += [(range(36, 37), range(22, 23)), (range(1), range(23))]
    for _ in range(60):
        (a, b), (c, d) = sorted(draw.sample(range(38), 2)), sorted(draw.sample(range(24), 2))
        blocks.append((range(a, b), range(c, d)))
    monkeypatch.setattr(rng, "_CHUNK", chunk)
    for rows, columns in blocks:
        got = normal_slice(7, (37, 23), rows, columns)
        assert torch.equal(got, whole[rows.start : rows.stop, columns.start : columns.stop])


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (5, 0), (0, 0)])
def test_an_empty_block(rows: int, columns: int) -> None:
    got = normal_slice(7, (37, 23), range(3, 3 + rows), range(2, 2 + columns))
    assert got.shape == (rows, columns)


def test_places_of_a_huge_matrix_do_not_overflow() -> None:
    shape = (3_000_000, 3_000_000)
    got = normal_slice(7, shape, range(2_999_998, 3_000_000), range(2_999_997, 3_000_000))
    place = [
        [row * 3_000_000 + column for column in range(2_999_997, 3_000_000)]
        for row in (2_999_998, 2_999_999)
    ]
    assert torch.equal(got, normal(7, torch.tensor(place)))


def test_values_do_not_depend_on_threads() -> None:
    threads = torch.get_num_threads()
    values = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            values.append(normal_slice(3, (600, 700), range(600), range(700)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*values)
    alone = normal_slice(3, (600, 700), range(5, 6), range(699, 700))
    assert alone.item() == values[0][5, 699].item()
