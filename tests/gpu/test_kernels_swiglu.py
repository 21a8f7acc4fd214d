"""SwiGLU's kernels on the card: errors beside eager torch's in the same dtype, full sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels import swiglu

LOW = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def eager(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def poison(x: Tensor) -> None:
    """Leave NaN where the allocator takes the next tensors of this size from."""
    for tensor in [torch.full_like(x, torch.nan) for _ in range(2)]:
        del tensor


def outcomes(
    operation: Callable[[Tensor], Tensor], gate_up: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor]:
    leaf = gate_up.detach().requires_grad_()
    poison(dy)
    y = operation(leaf)
    poison(gate_up)
    return y.detach(), torch.autograd.grad(y, leaf, dy)[0]


WIDTHS = [(4096, 8192), (4096, 11008), (4096, 14336), (1024, 28672), (1000, 353), (64, 5)]


@pytest.mark.parametrize("dtype", [*LOW, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "width"), WIDTHS)
def test_errors(rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = (2 * torch.randn(rows, 2 * width, device="cuda")).to(dtype)
    dy = torch.randn(rows, width, device="cuda").to(dtype)
    got = outcomes(swiglu, gate_up, dy)
    exact = outcomes(eager, gate_up.double(), dy.double())
    if dtype == torch.float32:
        for a, b in zip(got, exact, strict=True):
            largest = b.abs().amax(-1, keepdim=True)
            assert ((a - b).abs() / largest).max() < 1e-5
        return
    theirs = outcomes(eager, gate_up, dy)
    for a, b, c in zip(got, theirs, exact, strict=True):
        errors = [(x.double() - c).abs() for x in (a, b)]
        assert errors[0].max() <= 1.1 * errors[1].max()
        assert errors[0].square().mean().sqrt() <= 1.1 * errors[1].square().mean().sqrt()


@pytest.mark.parametrize("size", [1e-15, 1e2, 1e18])
def test_huge_and_tiny(size: float) -> None:
    gate_up = size * torch.randn(100, 2 * 1000, device="cuda")
    dy = torch.randn(100, 1000, device="cuda")
    exact = outcomes(eager, gate_up.double(), dy.double())
    for a, b in zip(outcomes(swiglu, gate_up, dy), exact, strict=True):
        assert ((a - b).abs() / b.abs().amax(-1, keepdim=True)).max() < 1e-5


def test_the_same_bits_each_time() -> None:
    gate_up = torch.randn(4096, 2 * 14336, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(4096, 14336, device="cuda", dtype=torch.bfloat16)
    first = outcomes(swiglu, gate_up, dy)
    for _ in range(3):
        assert all(map(torch.equal, first, outcomes(swiglu, gate_up, dy)))


def test_more_elements_than_32_bits_count() -> None:
    gate_up = torch.randn(75_000, 2 * 14336, device="cuda", dtype=torch.bfloat16)
    assert gate_up.numel() > 1 << 31
    dy = torch.randn(75_000, 14336, device="cuda", dtype=torch.bfloat16)
    got = outcomes(swiglu, gate_up, dy)
    for place in (slice(0, 500), slice(-500, None)):
        exact = outcomes(eager, gate_up[place].double(), dy[place].double())
        for a, b in zip(got, exact, strict=True):
            torch.testing.assert_close(a[place].double(), b, rtol=1e-2, atol=1e-2)


def test_compiled_without_breaks() -> None:
    compiled = torch.compile(swiglu, fullgraph=True)
    for rows in (100, 101):
        gate_up = torch.randn(rows, 2, 2 * 1000, device="cuda", dtype=torch.bfloat16)
        dy = torch.randn(rows, 2, 1000, device="cuda", dtype=torch.bfloat16)
        both = [outcomes(f, gate_up, dy) for f in (swiglu, compiled)]
        assert all(map(torch.equal, *both))


def test_captured_in_a_graph() -> None:
    gate_up = torch.randn(512, 2 * 1000, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(512, 1000, device="cuda", dtype=torch.bfloat16)
    wanted = outcomes(swiglu, gate_up, dy)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        leaf = gate_up.requires_grad_()
        y = swiglu(leaf)
        (gradient,) = torch.autograd.grad(y, leaf, dy)
    y.detach().fill_(torch.nan)
    gradient.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, wanted[0]) and torch.equal(gradient, wanted[1])
