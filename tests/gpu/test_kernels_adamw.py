"""AdamW's kernel on the card, against torch.optim.AdamW in fp64 and its fused version in fp32."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from megalite_kernels import adamw_, reference

NUMBERS = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@dataclass
class State:
    """Buffers of one optimizer."""

    master: Tensor
    exp_avg: Tensor = field(init=False)
    exp_avg_sq: Tensor = field(init=False)
    step: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.exp_avg, self.exp_avg_sq = (torch.zeros_like(self.master) for _ in range(2))
        self.step = torch.zeros(1, device="cuda")

    def update(self, gradient: Tensor, lr: float, **options: Tensor) -> None:
        self.step += 1
        buffers = (self.master, gradient, self.exp_avg, self.exp_avg_sq, self.step)
        adamw_(*buffers, lr=lr, **NUMBERS, **options)

    def tensors(self) -> list[Tensor]:
        return [self.master, self.exp_avg, self.exp_avg_sq]


class Theirs:
    """torch.optim.AdamW."""

    def __init__(self, master: Tensor, fused: bool = False):
        self.parameter = torch.nn.Parameter(master.clone())
        self.optimizer = torch.optim.AdamW(
            [self.parameter], lr=1.0, weight_decay=0.1, betas=(0.9, 0.999), fused=fused
        )

    def update(self, gradient: Tensor, lr: float) -> None:
        self.parameter.grad = gradient.to(self.parameter.dtype)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def tensors(self) -> list[Tensor]:
        (state,) = self.optimizer.state.values()
        return [self.parameter.detach(), state["exp_avg"], state["exp_avg_sq"]]


def test_a_hundred_steps_as_exact_as_torch() -> None:
    size = 1_000_003
    start, sizes = torch.randn(size, device="cuda"), 10.0 ** torch.linspace(-6, 2, size)
    sizes = sizes.cuda()
    ours, theirs, exact = State(start.clone()), Theirs(start, fused=True), Theirs(start.double())
    scales = [torch.ones_like(sizes), sizes, sizes.square()]
    for step in range(100):
        gradient = torch.randn_like(sizes) * sizes
        lr = 1e-3 * (1 + math.sin(step / 10)) + 1e-5
        for optimizer in (ours, theirs, exact):
            optimizer.update(gradient, lr)
        if step in (0, 1, 10, 99):
            states = (ours.tensors(), theirs.tensors(), exact.tensors())
            for mine, fused, right, scale in zip(*states, scales, strict=True):
                errors = [((x - right) / scale).square().mean().sqrt() for x in (mine, fused)]
                assert errors[0] <= 1.1 * errors[1], (step, errors)


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 2047, 100_000, 1_000_001])
def test_scale_copy_and_skip(size: int, gradient_dtype: torch.dtype) -> None:
    gradient = torch.randn(size, device="cuda").to(gradient_dtype)
    scale, copy = torch.tensor(0.37, device="cuda"), torch.zeros(size, device="cuda").bfloat16()
    start = torch.randn(size, device="cuda")
    ours, exact = State(start.clone()), Theirs(start.double())
    go = torch.zeros((), device="cuda")
    ours.update(gradient, 1e-2, scale=scale, copy=copy, skip=go)
    exact.update(gradient.double() * scale.double(), 1e-2)
    for a, b in zip(ours.tensors(), exact.tensors(), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-7)
    assert torch.equal(copy, ours.master.bfloat16())

    before = [x.clone() for x in (*ours.tensors(), copy)]
    bad = torch.full_like(gradient, torch.nan)
    ours.update(bad, 1e-2, scale=scale * torch.inf, copy=copy, skip=go + 1)
    assert all(map(torch.equal, before, (*ours.tensors(), copy)))


@dataclass
class Apart:
    """A state in the middle of a run, and where the next one goes, full of NaN."""

    size: int
    gradient_dtype: torch.dtype
    copy_dtype: torch.dtype

    def __post_init__(self) -> None:
        w, m, v, g = (torch.randn(self.size, device="cuda") for _ in range(4))
        self.old, self.gradient = (w, m, v.square()), g.to(self.gradient_dtype)
        self.step = torch.tensor(4.0, device="cuda")
        self.out = tuple(torch.full_like(x, torch.nan) for x in self.old)
        self.copy = torch.full_like(w, torch.nan, dtype=self.copy_dtype)

    def call(self, *, apart: bool, **flags: Tensor) -> list[Tensor]:
        """New w, m, v and copy, of a step to `out` or, on clones, in place."""
        w, m, v = self.old if apart else [x.clone() for x in self.old]
        out = self.out if apart else None
        copy = self.copy if apart else w.to(self.copy_dtype)
        buffers = (w, self.gradient, m, v, self.step)
        adamw_(*buffers, lr=1e-2, **NUMBERS, copy=copy, out=out, **flags)
        return [x.clone() for x in (*(self.out if apart else (w, m, v)), copy)]


@pytest.mark.parametrize("copy_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 2047, 100_000, 1_000_001])
def test_apart_it_is_bit_for_bit_what_it_is_in_place(
    size: int, gradient_dtype: torch.dtype, copy_dtype: torch.dtype
) -> None:
    """Without `skip`, with it, and skipped; with the factor 1 as without one."""
    state = Apart(size, gradient_dtype, copy_dtype)
    before = [x.clone() for x in state.old]
    one, go = torch.ones((), dtype=torch.float64, device="cuda"), torch.zeros((), device="cuda")
    plain = state.call(apart=False)
    for flags in ({}, dict(skip=go), dict(scale=one), dict(scale=one, skip=go, run=go + 1)):
        assert all(map(torch.equal, plain, state.call(apart=True, **flags)))
    state.gradient.fill_(torch.nan)
    skipped = state.call(apart=True, scale=one * torch.nan, skip=go + 1)
    assert all(map(torch.equal, [*before, before[0].to(copy_dtype)], skipped))
    assert all(map(torch.equal, before, state.old))
    assert not torch.equal(plain[0], before[0])


@pytest.mark.parametrize("size", [1, 100_000, 1_000_001])
def test_a_wrong_guess_is_amended_and_a_right_one_left(size: int) -> None:
    """What is done again, only where a flag on the device says so, has the bits of one call."""
    state = Apart(size, torch.float32, torch.bfloat16)
    factor = torch.tensor(0.2, dtype=torch.float64, device="cuda")
    go, yes = torch.zeros((), device="cuda"), torch.ones((), device="cuda")
    wanted = state.call(apart=False, scale=factor)
    wrong = state.call(apart=True, scale=torch.full_like(factor, torch.nan))
    assert all(x.isnan().all() for x in wrong)
    left = state.call(apart=True, scale=factor, skip=go, run=go)
    assert all(x.isnan().all() for x in left)
    assert all(map(torch.equal, wanted, state.call(apart=True, scale=factor, skip=go, run=yes)))


def test_slices_that_start_anywhere() -> None:
    wide, gradients = torch.randn(3000, device="cuda"), torch.randn(3000, device="cuda")
    for start, stop in ((1, 2999), (16, 2900), (3, 2051)):
        before = wide.clone()
        ours, exact = State(wide[start:stop]), Theirs(wide[start:stop].double())
        ours.update(gradients[start:stop], 1e-2)
        exact.update(gradients[start:stop], 1e-2)
        torch.testing.assert_close(ours.master.double(), exact.tensors()[0], rtol=1e-6, atol=1e-7)
        assert torch.equal(before[:start], wide[:start])
        assert torch.equal(before[stop:], wide[stop:])


def test_more_elements_than_32_bits_count() -> None:
    size = (1 << 31) + 5000
    ours = State(torch.randn(size, device="cuda"))
    gradient = torch.randn(size, device="cuda")
    copy = torch.full((size,), torch.nan, device="cuda", dtype=torch.bfloat16)
    places = [slice(0, 5000), slice((1 << 31) - 2500, (1 << 31) + 2500), slice(-3000, None)]
    before = [ours.master[place].double() for place in places]
    ours.update(gradient, 1e-2, copy=copy)
    for place, start in zip(places, before, strict=True):
        exact = Theirs(start)
        exact.update(gradient[place], 1e-2)
        for a, b in zip(ours.tensors(), exact.tensors(), strict=True):
            torch.testing.assert_close(a[place].double(), b, rtol=1e-6, atol=1e-7)
    assert torch.equal(copy[-(1 << 20) :], ours.master[-(1 << 20) :].bfloat16())
    assert copy.isfinite().all()


def test_the_reference_on_the_card() -> None:
    """Same semantics there, without the kernel: both as near to fp64 as torch.optim.AdamW."""
    start, gradient = (torch.randn(100_000, device="cuda") for _ in range(2))
    ours, plain = State(start.clone()), State(start.clone())
    fused, exact = Theirs(start, fused=True), Theirs(start.double())
    scale = torch.tensor(0.5, dtype=torch.float64, device="cuda")
    for _ in range(3):
        ours.update(gradient, 1e-2, scale=scale)
        plain.step += 1
        buffers = (*plain.tensors(), plain.step)
        reference.adamw_(buffers[0], gradient, *buffers[1:], lr=1e-2, **NUMBERS, scale=scale)
        for optimizer in (fused, exact):
            optimizer.update(gradient * 0.5, 1e-2)
    states = (ours.tensors(), plain.tensors(), fused.tensors(), exact.tensors())
    for *results, right in zip(*states, strict=True):
        kernel, definition, theirs = ((x.double() - right).square().mean().sqrt() for x in results)
        assert kernel <= 1.1 * theirs and definition <= 1.1 * theirs, (kernel, definition, theirs)


def test_the_same_bits_each_time() -> None:
    start, gradient = torch.randn(10**6, device="cuda"), torch.randn(10**6, device="cuda")
    states = [State(start.clone()) for _ in range(3)]
    for state in states:
        for _ in range(3):
            state.update(gradient, 1e-2)
    for state in states[1:]:
        assert all(map(torch.equal, states[0].tensors(), state.tensors()))


def test_compiled_without_breaks_or_recompiling_for_a_rate() -> None:
    def run(state: State, gradient: Tensor, lr: float) -> None:
        buffers = (state.master, gradient, state.exp_avg, state.exp_avg_sq, state.step)
        adamw_(*buffers, lr=lr, **NUMBERS)

    states = [State(torch.ones(5000, device="cuda")) for _ in range(2)]
    compiled = torch.compile(run, fullgraph=True)
    for lr in (1e-2, 2e-2, 3e-2):
        gradient = torch.randn(5000, device="cuda")
        for state, call in zip(states, (run, compiled), strict=True):
            state.step += 1
            call(state, gradient, lr)
    assert all(map(torch.equal, states[0].tensors(), states[1].tensors()))


def test_captured_in_a_graph() -> None:
    """The count of steps is read on the device, so a replay is the next step."""
    start, gradient = torch.randn(5000, device="cuda"), torch.randn(5000, device="cuda")
    eager, captured = State(start.clone()), State(start.clone())
    eager.update(gradient, 1e-2)
    captured.update(gradient, 1e-2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.update(gradient, 1e-2)
    for _ in range(3):
        eager.update(gradient, 1e-2)
        graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, eager.tensors(), captured.tensors()))
