"""Stochastic rounding in AdamW's kernel on the card: the definition's numbers, at any length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megalite_kernels import adamw_, reference

NUMBERS = dict(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
DRAWS = (-(2**62) - 12345, 2**40 + 17)
BUFFERS = {
    "moments": (torch.float32, torch.bfloat16),
    "all": (torch.bfloat16, torch.bfloat16),
    "weights": (torch.bfloat16, torch.float32),
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def state(which: str, size: int) -> list[Tensor]:
    """w, gradient, m and v in the middle of a run."""
    weights, moments = BUFFERS[which]
    w, g, m, v = (torch.randn(size, device="cuda") for _ in range(4))
    return [w.to(weights), g, m.to(moments), v.square().to(moments)]


def stepped(buffers: list[Tensor], function: Any = adamw_, **options: Any) -> list[Tensor]:
    """New w, m and v, on clones."""
    w, g, m, v = (x.clone() for x in buffers)
    step = torch.tensor(4.0, device=w.device)
    function(w, g, m, v, step, **NUMBERS | dict(draws=DRAWS) | options)
    return [w, m, v]


@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", BUFFERS)
@pytest.mark.parametrize("size", [1, 2047, 100_000, 1_000_001])
def test_the_kernel_draws_the_numbers_of_the_definition(
    size: int, which: str, gradient: torch.dtype
) -> None:
    buffers = state(which, size)
    buffers[1] = buffers[1].to(gradient)
    scale = torch.tensor(0.37, device="cuda")
    # On the CPU: torch's own function on a GPU differs from the kernel by more than this bound.
    definition = stepped([x.cpu() for x in buffers], reference.adamw_, scale=scale.cpu())
    results = stepped(buffers, scale=scale), [x.cuda() for x in definition]
    for ours, theirs, terms in zip(*results, magnitudes(buffers, scale), strict=True):
        assert ours.dtype == theirs.dtype
        is_rounded = ours.dtype == torch.bfloat16
        # Of fp32 results that differ in the last bit a few in 2^16 fall to the other side.
        assert not is_rounded or (ours != theirs).sum() <= 3 + 1e-4 * size
        error = (ours.double() - theirs.double()).abs()
        assert (error <= (2**-7 if is_rounded else 2e-6) * terms).all()


def magnitudes(buffers: list[Tensor], scale: Tensor) -> list[Tensor]:
    """Of the terms that new w, m and v are sums of, which may be much larger than the sums."""
    w, g, m, v = (x.double() for x in buffers)
    step = torch.tensor(4.0, device="cuda")
    moved, terms = torch.zeros_like(w), m.abs()
    plain = {name: value for name, value in NUMBERS.items() if name != "weight_decay"}
    squares = v.clone()
    reference.adamw_(
        moved, g.abs(), terms, squares, step, **plain, weight_decay=0.0, scale=scale.double()
    )
    return [w.abs() + moved.abs(), terms, squares]


@pytest.mark.parametrize("which", BUFFERS)
def test_the_same_bits_each_time_whole_or_in_parts(which: str) -> None:
    buffers, cut = state(which, 10**6), 123_457
    wanted = stepped(buffers)
    for _ in range(3):
        assert all(map(torch.equal, wanted, stepped(buffers)))
    halves = [
        stepped([x[part] for x in buffers], draws=(DRAWS[0], DRAWS[1] + (part.start or 0)))
        for part in (slice(None, cut), slice(cut, None))
    ]
    assert all(map(torch.equal, wanted, map(torch.cat, zip(*halves, strict=True))))
    other = stepped(buffers, draws=(DRAWS[0] + 1, DRAWS[1]))
    rounded = [a.dtype == torch.bfloat16 for a in wanted]
    assert [not torch.equal(a, b) for a, b in zip(wanted, other, strict=True)] == rounded


@pytest.mark.parametrize("which", BUFFERS)
def test_skipped_apart_and_amended(which: str) -> None:
    w, g, m, v = buffers = state(which, 100_000)
    zero, one = torch.zeros((), device="cuda"), torch.ones((), device="cuda")
    factor, step = 0.2 * one, 4.0 * one
    out = tuple(torch.full_like(x, 3.0) for x in (w, m, v))
    copy = torch.full_like(w, 3.0, dtype=torch.bfloat16)
    wanted = stepped(buffers, scale=factor)
    assert all(map(torch.equal, stepped([w, g * torch.nan, m, v], skip=one), (w, m, v)))
    call = dict(out=out, copy=copy, draws=DRAWS, **NUMBERS)
    adamw_(w, g, m, v, step, scale=factor * torch.nan, **call)
    assert all(x.isnan().all() for x in (*out, copy))
    for x in (*out, copy):
        x.fill_(3.0)
    adamw_(w, g, m, v, step, scale=factor, run=zero, **call)
    assert all((x == 3.0).all() for x in (*out, copy))
    adamw_(w, g, m, v, step, scale=factor, run=one, skip=zero, **call)
    assert all(map(torch.equal, out, wanted))
    assert torch.equal(copy, wanted[0].bfloat16())


def test_more_elements_than_32_bits_count() -> None:
    """Places beyond 2^32 too: the numbers are those of the place, wherever a buffer begins."""
    size, first = (1 << 31) + 5000, (1 << 32) - (1 << 30)
    w, g = (torch.randn(size, device="cuda").bfloat16() for _ in range(2))
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    places = [slice(0, 5000), slice((1 << 30) - 2500, (1 << 30) + 2500), slice(size - 3000, size)]
    places.append(slice((1 << 31) - 2500, (1 << 31) + 2500))
    before = [[x[place].clone() for x in (w, g, m, v)] for place in places]
    adamw_(w, g, m, v, torch.tensor(4.0, device="cuda"), **NUMBERS, draws=(DRAWS[0], first))
    for place, buffers in zip(places, before, strict=True):
        alone = stepped(buffers, draws=(DRAWS[0], first + place.start))
        assert all(map(torch.equal, alone, (x[place] for x in (w, m, v))))


def test_a_second_moment_follows_fp32() -> None:
    """2000 steps, after which one that is rounded to the nearest stands at half of it."""
    moments: dict[torch.dtype, Tensor] = {}
    for dtype, draws in ((torch.float32, None), (torch.bfloat16, DRAWS)):
        w, g = torch.zeros(10_000, device="cuda"), torch.full((10_000,), 0.7, device="cuda")
        m, v = (torch.zeros(10_000, device="cuda", dtype=dtype) for _ in range(2))
        for step in range(2000):
            count = torch.tensor(step + 1.0, device="cuda")
            adamw_(w, g, m, v, count, **NUMBERS | dict(lr=0.0), draws=draws)
        moments[dtype] = v.double().mean()
    assert abs(moments[torch.bfloat16] / moments[torch.float32] - 1) < 2e-3


def test_compiled_without_breaks() -> None:
    def run(buffers: list[Tensor], step: Tensor, place: int) -> None:
        adamw_(*buffers, step, **NUMBERS, draws=(DRAWS[0], place))

    eager, traced = (state("all", 5000) for _ in range(2))
    for mine, theirs in zip(eager, traced, strict=True):
        theirs.copy_(mine)
    compiled = torch.compile(run, fullgraph=True)
    for place in (0, 5000, 2**33):
        step = torch.tensor(float(place % 7 + 1), device="cuda")
        run(eager, step, place)
        compiled(traced, step, place)
    assert all(map(torch.equal, eager, traced))


def test_captured_in_a_graph() -> None:
    """The count of steps is read on the device, so a replay draws the next step's numbers."""
    eager = state("all", 5000)
    captured = [x.clone() for x in eager]
    steps = [torch.zeros((), device="cuda") for _ in range(2)]

    def update(buffers: list[Tensor], step: Tensor) -> None:
        step += 1
        adamw_(*buffers, step, **NUMBERS, draws=DRAWS)

    update(eager, steps[0])
    update(captured, steps[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update(captured, steps[1])
    for _ in range(3):
        update(eager, steps[0])
        graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, eager, captured))
