"""RMSNorm and residual add + RMSNorm in Triton's interpreter, against their definition in fp64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from megalite_kernels import add_rms_norm, reference, rms_norm, use_backend
from megalite_kernels.check import CASTINGS
from megalite_kernels.fused.rms_norm import (
    BACKWARD,
    BACKWARD_WIDER,
    Backward,
    Forward,
    _plan,
    launch_backward,
    launch_forward,
)

EPS = 1e-5
Operation = Callable[..., Tensor | tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    with use_backend("triton"):
        yield


def run(operation: Operation, inputs: list[Tensor], grads: list[Tensor | None], *args: object):
    """Results and gradients, as doubles."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    results = operation(*leaves, EPS, *args)
    results = results if isinstance(results, tuple) else (results,)
    used = [(y, g.to(y.dtype)) for y, g in zip(results, grads, strict=True) if g is not None]
    outputs, gradients = zip(*used, strict=True)
    taken = torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)
    for leaf, grad in zip(leaves, taken, strict=True):
        assert grad is None or (grad.dtype == leaf.dtype and grad.shape == leaf.shape)
    return [y.detach().double() for y in results] + [
        torch.zeros_like(leaf).double() if grad is None else grad.double()
        for leaf, grad in zip(leaves, taken, strict=True)
    ]


def relative(got: Tensor, exact: Tensor) -> float:
    """Largest error over the row's largest value."""
    if exact.numel() == 0:
        assert got.shape == exact.shape
        return 0.0
    largest = exact.abs().amax(-1, keepdim=True).clamp(min=1e-300)
    return ((got - exact).abs() / largest).max().item()


def check(name: str, inputs: list[Tensor], grads: list[Tensor | None], bound: float, *args: object):
    ours, definition = {
        "rms_norm": (rms_norm, reference.rms_norm),
        "add_rms_norm": (add_rms_norm, reference.add_rms_norm),
    }[name]
    got = run(ours, inputs, grads, *args)
    exact = run(definition, [x.double() for x in inputs], grads, *args)
    errors = [relative(a, b) for a, b in zip(got, exact, strict=True)]
    assert max(errors) < bound, errors


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


@pytest.mark.parametrize("casting", CASTINGS)
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 100), (37, 7), (300,), (3, 3), (1, 2100)])
def test_against_fp64(shape: tuple[int, ...], casting: str) -> None:
    x, residual, dy, dres = (normal(*shape) for _ in range(4))
    weight = normal(shape[-1])
    check("rms_norm", [x, weight], [dy], 1e-5, casting)
    check("add_rms_norm", [x, residual, weight], [dy, dres], 1e-5, casting)


@pytest.mark.parametrize("casting", CASTINGS)
@pytest.mark.parametrize(
    ("of_x", "of_residual", "of_weight"),
    [
        (torch.float16, torch.float16, torch.float16),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float16, torch.float16),
        (torch.float16, torch.float32, torch.float16),
    ],
)
def test_dtypes(of_x, of_residual, of_weight, casting: str) -> None:
    x, dy = normal(6, 96, dtype=of_x), normal(6, 96, dtype=of_x)
    residual, dres = normal(6, 96, dtype=of_residual), normal(6, 96, dtype=of_residual)
    weight = normal(96, dtype=of_weight)
    check("rms_norm", [x, weight], [dy], 2e-3, casting)
    check("add_rms_norm", [x, residual, weight], [dy, dres], 4e-3, casting)


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm"])
def test_fp16_is_rounded_where_the_definition_rounds(name: str) -> None:
    inputs = [normal(8, 128, dtype=torch.float16) for _ in range(1 + (name == "add_rms_norm"))]
    weight = normal(128, dtype=torch.float16)
    ours, definition = {
        "rms_norm": (rms_norm, reference.rms_norm),
        "add_rms_norm": (add_rms_norm, reference.add_rms_norm),
    }[name]
    for casting in CASTINGS:
        got, expected = (f(*inputs, weight, EPS, casting) for f in (ours, definition))
        if name == "add_rms_norm":
            assert torch.equal(got[1], expected[1])
            got, expected = got[0], expected[0]
        # A last bit of fp32 may tip a rounding, rarely; a rounding in the wrong place tips many.
        assert (got != expected).float().mean() < 0.005, casting


def test_one_gradient_of_two() -> None:
    x, residual, weight, grad = normal(5, 48), normal(5, 48), normal(48), normal(5, 48)
    for grads in ([grad, None], [None, grad]):
        check("add_rms_norm", [x, residual, weight], grads, 1e-5)
    wide = residual.half()
    check("add_rms_norm", [x, wide, weight], [None, grad], 1e-3)


def test_both_inputs_share_one_gradient() -> None:
    x, residual = (normal(4, 32).requires_grad_() for _ in range(2))
    y, total = add_rms_norm(x, residual, normal(32), EPS)
    dx, dresidual = torch.autograd.grad((y.sum() + total.sum()), (x, residual))
    assert torch.equal(dx, dresidual)


def test_strides() -> None:
    packed, weight = normal(4, 3, 2, 40), normal(80)[::2]
    x, residual = packed[:, :, 0], packed[:, :, 1].transpose(0, 1).contiguous().transpose(0, 1)
    dy, dres = normal(3, 4, 40).transpose(0, 1), normal(40, 4, 3).permute(1, 2, 0)
    check("rms_norm", [x, weight], [dy], 1e-5)
    check("add_rms_norm", [x, residual, weight], [dy, dres], 1e-5)
    one = normal(1, 1, 1).expand(4, 3, 40)
    check("add_rms_norm", [x, one, weight], [one, one], 1e-5)
    assert rms_norm(dy, weight, EPS).is_contiguous()


def test_zero_rows() -> None:
    for shape in ((0, 16), (3, 0, 16)):
        empty, weight = normal(*shape), normal(16)
        check("rms_norm", [empty, weight], [empty], 1e-5)
        check("add_rms_norm", [empty, empty, weight], [empty, empty], 1e-5)


@pytest.mark.parametrize("size", [1e-15, 1e-3, 1e4, 1e15])
def test_huge_and_tiny_values(size: float) -> None:
    x, residual, dy, dres = (normal(4, 72) * size for _ in range(4))
    weight = normal(72)
    check("rms_norm", [x, weight], [dy], 1e-5)
    check("add_rms_norm", [x, residual, weight], [dy, dres], 1e-5)
    zeros = torch.zeros(2, 72)
    check("rms_norm", [zeros, weight], [dy[:2]], 1e-5)


FORWARDS = [Forward(1, 4), Forward(4, 4)]
BACKWARDS = [
    Backward(rows, 4, 1, reads, keeps)
    for rows, reads, keeps in product((1, 4), ("staged", "ahead", "twice"), (False, True))
] + [Backward(4, 4, 2)]


@pytest.mark.parametrize("shape", [(18, 20), (3, 16)])
def test_every_plan_is_right(shape: tuple[int, int]) -> None:
    x, residual, dy, dres = (normal(*shape) for _ in range(4))
    weight = normal(shape[1])
    inputs = [tensor.double() for tensor in (x, residual, weight)]
    exact = run(reference.add_rms_norm, inputs, [dy, dres], "gemma")

    def compare(plan: Forward | Backward, results: list[Tensor], of: list[Tensor]) -> None:
        errors = [relative(a.double(), b) for a, b in zip(results, of, strict=True)]
        assert max(errors) < 1e-5, (plan, errors)

    rstd = torch.full((shape[0],), torch.nan)
    for plan in FORWARDS:
        y, total = (torch.full(shape, torch.nan) for _ in range(2))
        launch_forward(x, residual, weight, y, total, rstd, EPS, "gemma", plan)
        compare(plan, [y, total], exact[:2])
    for plan in BACKWARDS:
        dx, too = (torch.full(shape, torch.nan) for _ in range(2))
        dw = launch_backward(dy, dres, total, weight, rstd, dx, too, "gemma", plan)
        compare(plan, [dx, too, dw], exact[2:])


def test_a_plan_is_chosen_by_the_widest_row_that_is_read() -> None:
    """Shared memory that holds three tiles of bf16 doesn't hold them if one of two is of fp32."""
    narrow, wide = (torch.empty(1, 16384, dtype=t) for t in (torch.bfloat16, torch.float32))
    block = narrow.shape[1]
    for x, dy in ((narrow, wide), (wide, narrow), (wide, wide)):
        assert _plan(BACKWARD, block, x, dy, None, BACKWARD_WIDER) is BACKWARD_WIDER
    plans = [_plan(BACKWARD, block, narrow, narrow, y, BACKWARD_WIDER) for y in (None, narrow)]
    assert plans == list(BACKWARD[-1][1:])
    assert _plan(BACKWARD, block // 2, narrow, narrow, narrow, None) == BACKWARD[-2][2]


def test_compiled_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALITE_KERNELS", "triton")
    x, residual, dy, dres = (normal(4, 24) for _ in range(4))
    weight = normal(24)

    def layer(x: Tensor, residual: Tensor, weight: Tensor, eps: float):
        y, total = add_rms_norm(x, residual, weight, eps)
        return rms_norm(y, weight, eps), total

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for grads in ([dy, dres], [dy, None]):
        with torch.profiler.profile() as profile:
            got = run(compiled, [x, residual, weight], grads)
        eager = run(layer, [x, residual, weight], grads)
        for a, b in zip(got, eager, strict=True):
            assert relative(a, b) < 1e-6
        called = {event.key for event in profile.key_averages()}
        names = ("add_rms_norm_forward", "rms_norm_forward", "rms_norm_backward")
        assert {f"megalite::{name}" for name in names} <= called
