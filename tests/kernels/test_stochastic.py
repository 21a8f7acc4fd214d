"""Stochastic rounding to bf16: by definition, in AdamW's kernel, and what it is good for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import interpreted
from torch import Tensor

from megalite_kernels import adamw_, reference, use_backend
from megalite_kernels.stochastic import random_words, round_to_bf16

BACK_ENDS = [pytest.param("triton", marks=interpreted), "torch"]
ALL_BITS = torch.arange(1 << 16)
SIZE = 2100  # two programs and a bit


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def bf16_values() -> Tensor:
    """Every one of them, as fp32."""
    return ALL_BITS.to(torch.int16).view(torch.bfloat16).float()


@pytest.mark.parametrize("bits", [0, 1, 0x8000, 0xFFFF])
def test_what_bf16_holds_stays(bits: int) -> None:
    x = bf16_values()
    rounded = round_to_bf16(x, torch.full_like(ALL_BITS, bits)).float()
    assert torch.equal(rounded.isnan(), x.isnan())
    assert torch.equal(rounded.nan_to_num(nan=7.0), x.nan_to_num(nan=7.0))


def test_a_nan_of_all_ones_is_no_zero() -> None:
    nan = torch.full((1,), -1, dtype=torch.int32).view(torch.float32)
    assert round_to_bf16(nan, torch.full((1,), 0xFFFF)).isnan().all()


@pytest.mark.parametrize("x", [1.0 + 2**-9, -1.0 - 2**-11, 3.14159, 1e-40, -2e-30, 6e37])
def test_all_bits_together_are_right_on_average(x: float) -> None:
    """Up exactly as often as x is on the way: the mean over all bits is x itself."""
    value = torch.full_like(ALL_BITS, x, dtype=torch.float32)
    rounded = round_to_bf16(value, ALL_BITS).double()
    assert rounded.unique().numel() == 2, "the neighbours, both"
    assert rounded.mean().item() == value[0].item()


def words(key: int = 5, step: float = 3.0, place: int = 0, count: int = 1 << 18) -> Tensor:
    """Six fields of 16 bits by place, of which AdamW uses three: [6, count] of fp64 in [0, 1)."""
    both = random_words(key, torch.tensor(step), torch.arange(count) + place)
    fields = [word >> shift & 0xFFFF for word in both for shift in (0, 16)]
    return torch.stack(fields).double() / 2**16


def test_random_numbers_are_uniform_and_independent() -> None:
    streams = [words(), words(key=6), words(key=5 + (1 << 40)), words(key=-5), words(step=4.0)]
    streams += [words(place=1 << 18), words(place=1 << 32), words(place=(1 << 32) + (1 << 18))]
    fields = torch.cat(streams)
    count = fields.shape[1]
    for field in fields:
        seen = torch.histc(field, 256, 0, 1)
        squares = ((seen - count / 256).square() / (count / 256)).sum()
        assert 150 < squares < 400, "chi-square of 255 degrees of freedom"
    centred = (fields - 0.5) * 12**0.5
    neighbours = torch.cat([centred[:, 1:], centred[:, :-1]])
    for rows in (centred, neighbours):
        correlations = rows @ rows.t() / rows.shape[1] - torch.eye(len(rows))
        assert correlations.abs().max() < 6 / count**0.5


def test_they_are_those_of_the_place() -> None:
    assert torch.equal(words(place=1000, count=50), words(count=2000)[:, 1000:1050])


@pytest.mark.parametrize(
    ("key", "step", "place", "wanted"),
    [
        (0, 1, 0, (0, 33350994)),
        (-(2**63), 2**23, 2**40 + 3, (3897043557, 114762680)),
    ],
)
def test_they_stay_what_they_are(key: int, step: int, place: int, wanted: tuple) -> None:
    """Another stream would make another run of every configuration that rounds."""
    found = random_words(key, torch.tensor(step), torch.tensor([place]))
    assert tuple(word.item() for word in found) == wanted


# In AdamW

BUFFERS = {
    "moments": (torch.float32, torch.bfloat16),
    "all": (torch.bfloat16, torch.bfloat16),
    "weights": (torch.bfloat16, torch.float32),
}
NUMBERS = dict(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
DRAWS = (-(2**62) - 12345, 2**40 + 17)


def state(which: str) -> list[Tensor]:
    """w, gradient, m and v in the middle of a run."""
    weights, moments = BUFFERS[which]
    w, g, m, v = (torch.randn(SIZE) for _ in range(4))
    return [w.to(weights), g, m.to(moments), v.square().to(moments)]


def stepped(buffers: list[Tensor], step: float = 4.0, **options: Any) -> list[Tensor]:
    """New w, m and v, on clones."""
    w, g, m, v = (x.clone() for x in buffers)
    options = dict(draws=DRAWS) | options
    adamw_(w, g, m, v, torch.tensor(step), **NUMBERS | options)
    return [w, m, v]


@interpreted
@pytest.mark.parametrize("which", BUFFERS)
def test_the_kernel_draws_the_numbers_of_the_definition(which: str) -> None:
    buffers = state(which)
    results = []
    for name in ("triton", "torch"):
        with use_backend(name):
            results.append(stepped(buffers, scale=torch.tensor(0.37)))
    for ours, theirs in zip(*results, strict=True):
        if ours.dtype == torch.bfloat16:
            # Of fp32 results that differ in the last bit one in 2^16 is rounded to the other side.
            assert (ours != theirs).sum() <= 1
        torch.testing.assert_close(
            ours, theirs, rtol=1e-2 if ours.dtype != torch.float32 else 1e-6, atol=1e-6
        )


@pytest.mark.parametrize("which", BUFFERS)
@pytest.mark.parametrize("name", BACK_ENDS)
def test_results_lie_beside_those_of_fp32(name: str, which: str) -> None:
    """Each is one of the two neighbours of what fp32 makes of the same numbers."""
    buffers = state(which)
    wide = stepped([x.float() for x in buffers], draws=None)
    with use_backend(name):
        results = stepped(buffers)
    for rounded, exact in zip(results, wide, strict=True):
        if rounded.dtype == torch.float32:
            torch.testing.assert_close(rounded, exact, rtol=1e-6, atol=1e-6)
            continue
        low = round_to_bf16(exact, torch.zeros(SIZE).int()).float()
        high = round_to_bf16(exact, torch.full((SIZE,), 0xFFFF)).float()
        rounded = rounded.float()
        assert ((rounded == low) | (rounded == high)).float().mean() > 0.999
        share = ((rounded - low) / (high - low))[high != low].mean().item()
        wanted = ((exact - low) / (high - low))[high != low].mean().item()
        assert abs(share - wanted) < 4 * (0.25 / SIZE) ** 0.5


@pytest.mark.parametrize("name", BACK_ENDS)
def test_a_step_again_or_in_parts_is_bit_for_bit_the_same(name: str) -> None:
    buffers, cut = state("all"), 1025
    with use_backend(name):
        wanted = stepped(buffers)
        assert all(map(torch.equal, wanted, stepped(buffers)))
        halves = [
            stepped([x[part] for x in buffers], draws=(DRAWS[0], DRAWS[1] + (part.start or 0)))
            for part in (slice(None, cut), slice(cut, None))
        ]
        joined = [torch.cat(pair) for pair in zip(*halves, strict=True)]
        others = [
            stepped(buffers, draws=(DRAWS[0] + 1, DRAWS[1])),
            stepped(buffers, draws=(DRAWS[0], DRAWS[1] + 1)),
            stepped(buffers, step=5.0),
        ]
    assert all(map(torch.equal, wanted, joined))
    for other in others:
        assert not any(map(torch.equal, wanted, other)), "other numbers"


@pytest.mark.parametrize("which", BUFFERS)
@pytest.mark.parametrize("name", BACK_ENDS)
def test_skipped_apart_and_amended(name: str, which: str) -> None:
    """What is skipped stays, and a step to other buffers has the bits of one in place."""
    buffers = state(which)
    w, g, m, v = buffers
    before = [x.clone() for x in buffers]
    zero, one = torch.zeros(()), torch.ones(())
    out = tuple(torch.full_like(x, 3.0) for x in (w, m, v))
    copy = torch.full_like(w, 3.0)
    with use_backend(name):
        wanted = stepped(buffers, scale=torch.tensor(0.2))
        skipped = stepped([w, g * torch.nan, m, v], skip=one)
        assert all(map(torch.equal, skipped, (w, m, v)))
        call = dict(out=out, copy=copy, draws=DRAWS, **NUMBERS)
        adamw_(w, g, m, v, torch.tensor(4.0), scale=torch.tensor(torch.nan), **call)
        assert all(x.isnan().all() for x in (*out, copy))
        for x in (*out, copy):
            x.fill_(3.0)
        adamw_(w, g, m, v, torch.tensor(4.0), scale=torch.tensor(0.2), run=zero, **call)
        assert all((x == 3.0).all() for x in (*out, copy))
        adamw_(w, g, m, v, torch.tensor(4.0), scale=torch.tensor(0.2), run=one, skip=zero, **call)
    assert all(map(torch.equal, out, wanted))
    assert torch.equal(copy, wanted[0]), "weights are as the master holds them"
    assert all(map(torch.equal, before, buffers))


# What it is good for


def second_moment(beta2: float, steps: int, gradient: float, **options: Any) -> Tensor:
    """v after gradients of one size, mean over elements at 10, 20, ... steps."""
    moments = torch.bfloat16 if options else torch.float32
    w, g = torch.zeros(SIZE), torch.full((SIZE,), gradient)
    m, v = (torch.zeros(SIZE, dtype=moments) for _ in range(2))
    seen = []
    for step in range(steps):
        numbers = dict(lr=0.0, beta1=0.9, beta2=beta2, eps=1e-8, weight_decay=0.0)
        adamw_(w, g, m, v, torch.tensor(step + 1.0), **numbers, **options)
        if step % 10 == 9:
            seen.append(v.double().mean())
    return torch.stack(seen)


@pytest.mark.parametrize(("beta2", "stalls_at"), [(0.95, 0.98), (0.99, 0.9), (0.999, 0.6)])
def test_a_second_moment_follows_fp32_where_rounding_to_nearest_stands_still(
    beta2: float, stalls_at: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = round(4 / (1 - beta2))
    exact = second_moment(beta2, steps, 0.7)
    stochastic = second_moment(beta2, steps, 0.7, draws=DRAWS)
    assert ((stochastic - exact) / exact).abs().max() < 2e-3
    monkeypatch.setattr(reference, "round_to_bf16", lambda x, _: x.bfloat16())
    nearest = second_moment(beta2, steps, 0.7, draws=DRAWS)
    assert nearest[-1] == nearest[-2], "it moves no more"
    assert nearest[-1] < stalls_at * exact[-1]


def test_a_weight_in_bf16_takes_small_steps_where_rounding_to_nearest_takes_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """200 steps of 2^-12 each, of a weight of 1, whose steps in bf16 are 2^-7 and 2^-8."""

    def moved() -> Tensor:
        w, g = torch.ones(SIZE, dtype=torch.bfloat16), torch.ones(SIZE)
        m, v = (torch.zeros(SIZE, dtype=torch.bfloat16) for _ in range(2))
        numbers = dict(lr=2.0**-12, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0)
        for step in range(200):
            adamw_(w, g, m, v, torch.tensor(step + 1.0), **numbers, draws=DRAWS)
        return 1.0 - w.double()

    wanted = 200 * 2.0**-12
    assert abs(moved().mean() / wanted - 1) < 0.02
    monkeypatch.setattr(reference, "round_to_bf16", lambda x, _: x.bfloat16())
    assert moved().abs().max() == 0
