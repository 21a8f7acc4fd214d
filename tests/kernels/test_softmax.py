"""The softmax's kernels in Triton's interpreter against the definition in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import megalite_kernels
from megalite_kernels import reference, use_backend
from megalite_kernels.fused import softmax as fused
from megalite_kernels.fused.softmax_held import Held
from megalite_kernels.fused.softmax_walk import Walk

SCALE = 0.7
PLANS = {
    "held": Held(4),
    "walked": Walk(8, 4, 64),
}
TABLES = (fused.PLAIN, fused.MASKED, fused.CAUSAL, fused.PLAIN_BACKWARD, fused.CAUSAL_BACKWARD)


def masks(kind: str, shape: tuple[int, ...]) -> Tensor | None:
    """Of each way to broadcast; bool masks hide some rows whole."""
    batch, heads, queries, keys = shape
    if kind == "none":
        return None
    if kind == "bool":
        mask = torch.rand(batch, 1, queries, keys) > 0.4
        mask[0, 0, queries // 2] = True
        return mask
    if kind == "rows":
        return torch.rand(heads, queries, 1) > 0.6
    if kind == "added":
        mask = torch.randn(keys)
        mask[::3] = -torch.inf
        return mask
    assert kind == "turned"
    return torch.randn(batch, 1, keys, queries, dtype=torch.float64).transpose(2, 3)


def both(
    x: Tensor, dy: Tensor, scale: float = SCALE, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output, gradient) of the kernels, then of the definition in fp64."""
    ours, exact = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    with use_backend("triton"):
        y = megalite_kernels.softmax(ours, scale, mask, causal)
        (dx,) = torch.autograd.grad(y, ours, dy)
    want = reference.softmax(exact, scale, mask, causal)
    (want_dx,) = torch.autograd.grad(want, exact, dy.double())
    return y, dx, want.detach(), want_dx


def assert_close(ours: Tensor, want: Tensor, bound: float = 1e-5, least: float = 0.0) -> None:
    """Of the largest element of each row, or of `least` where that is larger."""
    assert ours.shape == want.shape
    error = (ours.double() - want).abs().amax(-1)
    worst = (error - bound * want.abs().amax(-1).clamp(min=least)).max().item()
    assert worst <= 0, f"{error.max().item()} off"


def assert_gradient_close(ours: Tensor, want: Tensor, bound: float = 1e-5) -> None:
    """The incoming gradient, of size 1, has a rounding of 1e-7, which is left where it cancels."""
    assert_close(ours, want, bound, least=0.01)


@pytest.mark.parametrize("kind", ["none", "bool", "rows", "added", "turned"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 2, 3, 40), (1, 2, 7, 5)])
def test_output_and_gradient_with_every_mask(
    shape: tuple[int, ...], causal: bool, kind: str
) -> None:
    x, dy = torch.randn(shape), torch.randn(shape)
    y, dx, want, want_dx = both(x, dy, SCALE, masks(kind, shape), causal)
    assert_close(y, want)
    assert_gradient_close(dx, want_dx)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("queries", [1, pytest.param(10, marks=pytest.mark.full), 15])
def test_every_plan_computes_the_same(plan: fused.Plan, queries: int) -> None:
    """Fewer queries than keys, and more: the first then have no key."""
    shape = (2, 2, queries, 12)
    x, dy = torch.randn(shape), torch.randn(shape)
    for causal, kind in ((True, "none"), (True, "bool"), (False, "bool"), (False, "added")):
        mask = masks(kind, shape)
        _, _, want, want_dx = both(x, dy, SCALE, mask, causal)
        y = fused.run_forward(x, mask, SCALE, causal, plan)
        assert_close(y, want)
        assert_gradient_close(fused.run_backward(dy, y, SCALE, causal, plan), want_dx)


@pytest.mark.parametrize("shape", [(5,), (3, 1), (1, 1), (70, 3), (2, 3, 2, 2, 3, 9), (3, 5000)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    x, dy = torch.randn(shape), torch.randn(shape)
    y, dx, want, want_dx = both(x, dy)
    assert_close(y, want)
    assert_gradient_close(dx, want_dx)


def test_matrices_that_share_a_mask_are_taken_together() -> None:
    shape = torch.Size((2, 3, 5, 8))
    rows = 2 * 3 * 5

    def order(*dims: int, causal: bool = False) -> tuple[int, int]:
        view = fused.view_mask(torch.ones(dims, dtype=torch.bool), shape)
        return view.order(causal, 5 if causal else rows)

    assert order(2, 1, 5, 8) == order(2, 1, 5, 8, causal=True) == (5, 3)
    assert order(1, 1, 5, 8) == order(5, 8, causal=True) == (5, 6)
    assert order(1, 3, 5, 8) == (15, 2)
    # The causal order is by queries of one matrix; a mask of none of them is shared by neighbours.
    assert order(1, 3, 5, 8, causal=True) == order(2, 3, 5, 8, causal=True) == (5, 1)
    assert order(2, 3, 5, 8) == order(2, 1, 1, 8) == order(1, 3, 1, 8) == (rows, 1)


def test_a_mask_of_dims_that_do_not_merge() -> None:
    x = torch.randn(2, 3, 2, 3, 4)
    mask = torch.rand(2, 1, 2, 1, 4) > 0.5
    y, _, want, _ = both(x, torch.randn_like(x), mask=mask)
    assert_close(y, want)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (2, 0, 3)])
def test_nothing(shape: tuple[int, ...]) -> None:
    y, dx, _, _ = both(torch.randn(shape), torch.randn(shape), causal=True)
    assert y.shape == dx.shape == shape


def test_half_precision_rounds_once() -> None:
    x, dy = torch.randn(2, 3, 8, 40).half(), torch.randn(2, 3, 8, 40).half()
    y, dx, want, want_dx = both(x, dy, mask=torch.randn(8, 40), causal=True)
    assert y.dtype == dx.dtype == torch.float16
    assert_close(y, want, 2.0**-11)
    # The gradient is of the rounded output.
    assert_gradient_close(dx, want_dx, 2.0**-9)


def test_inputs_that_are_not_contiguous() -> None:
    wide = torch.randn(4, 6, 50)
    for x in (wide[..., 3:40], wide[:, ::2], wide.transpose(0, 2), wide[:1].expand(3, 6, 50)):
        y, dx, want, want_dx = both(x, torch.ones(1).expand(x.shape) * x)
        assert y.is_contiguous()
        assert_close(y, want)
        assert_gradient_close(dx, want_dx)
        both(x, torch.ones(1).expand(x.shape))


@pytest.mark.parametrize("size", [1e-30, 1e3, 1e30])
def test_huge_and_tiny_values(size: float) -> None:
    x = torch.randn(3, 33) * size
    y, dx, want, want_dx = both(x, torch.randn(3, 33), scale=1.0)
    assert_close(y, want)
    assert_gradient_close(dx, want_dx)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_row_without_a_key_is_zero_and_a_lowest_number_is_a_key(plan: fused.Plan) -> None:
    lowest = torch.finfo(torch.float32).min
    x = torch.randn(5, 40)
    x[0] = -torch.inf  # no key by itself
    x[1, 1:] = -torch.inf
    x[2] = lowest  # keys all the same
    x[3] = torch.nan  # hidden by the mask
    x[4, 7] = torch.nan  # seen
    mask = torch.zeros(5, 40, dtype=torch.bool)
    mask[3] = True
    y = fused.run_forward(x, mask, 1.0, False, plan)
    dx = fused.run_backward(torch.randn(5, 40), y, 1.0, False, plan)
    assert y[0].eq(0).all() and y[3].eq(0).all() and dx[0].eq(0).all() and dx[3].eq(0).all()
    assert y[1, 0] == 1 and y[1, 1:].eq(0).all()
    torch.testing.assert_close(y[2], torch.full((40,), 1 / 40))
    assert y[4].isnan().all()
    torch.testing.assert_close(y, reference.softmax(x, 1.0, mask), equal_nan=True)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_what_lies_above_the_diagonal_has_no_effect(plan: fused.Plan) -> None:
    x, dy = torch.randn(2, 24, 24), torch.randn(2, 24, 24)
    above = torch.ones(24, 24, dtype=torch.bool).triu(1)
    want = fused.run_forward(x, None, SCALE, True, plan)
    want_dx = fused.run_backward(dy, want, SCALE, True, plan)
    y = fused.run_forward(x.masked_fill(above, torch.nan), None, SCALE, True, plan)
    dx = fused.run_backward(dy.masked_fill(above, torch.nan), y, SCALE, True, plan)
    assert torch.equal(y, want) and torch.equal(dx, want_dx)
    assert y[:, above].eq(0).all() and dx[:, above].eq(0).all()


@pytest.mark.parametrize(
    "keys", sorted({min(most, 33000) - 4 for table in TABLES for most, _ in table})
)
@pytest.mark.parametrize(
    ("causal", "kind"), [(False, "none"), (False, "bool"), (True, "none"), (True, "added")]
)
def test_every_plan_of_the_tables_at_a_length_it_serves(causal: bool, kind: str, keys: int) -> None:
    shape = (1, 2, 2, keys)
    x, dy = torch.randn(shape), torch.randn(shape)
    y, dx, want, want_dx = both(x, dy, SCALE, masks(kind, shape), causal)
    assert_close(y, want)
    assert_gradient_close(dx, want_dx)


@pytest.mark.parametrize("table", TABLES)
def test_tables_serve_every_length(table: fused.Table) -> None:
    bounds = [most for most, _ in table]
    assert bounds == sorted(bounds) and bounds[-1] == fused.ANY


def test_compiled_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALITE_KERNELS", "triton")
    x = torch.randn(2, 4, 8, requires_grad=True)
    mask = torch.rand(1, 4, 8) > 0.8

    def loss(x: Tensor) -> Tensor:
        return megalite_kernels.softmax(x * 2, SCALE, mask, True).square().sum()

    (want,) = torch.autograd.grad(loss(x), x)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    with torch.profiler.profile() as profile:
        (ours,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(ours, want)
    called = {event.key for event in profile.key_averages()}
    assert {"megalite::softmax_forward", "megalite::softmax_backward"} <= called
