"""The softmax's kernels on the card: errors beside torch's own in the same dtype, full sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalite_kernels import reference, softmax
from megalite_kernels.fused import softmax as fused

SCALE = 0.125
"""A power of two, so that torch's eager scaling in bf16 is exact as well."""

KINDS = ("none", "bool", "added", "causal", "causal, bool")


def inputs(
    kind: str, rows: int, keys: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """(x, incoming gradient, mask, causal) of 2 samples and 2 heads."""
    torch.manual_seed(keys)
    x = 40 * torch.randn(2, 2, rows, keys, device="cuda", dtype=dtype)
    mask = None
    if "bool" in kind:
        mask = torch.rand(2, 1, rows, keys, device="cuda") > 0.6
        mask[0, 0, rows // 2] = True
    elif kind == "added":
        mask = torch.randn(2, 1, 1, keys, device="cuda", dtype=dtype)
    return x, torch.randn_like(x), mask, kind.startswith("causal")


def poison(x: Tensor) -> None:
    """Leave NaN where the allocator takes the next tensors of this size from."""
    for tensor in [torch.full_like(x, torch.nan) for _ in range(2)]:
        del tensor


def eager(x: Tensor, scale: float, mask: Tensor | None, causal: bool) -> Tensor:
    """What one writes in torch, in the dtype of x; only rows without a key are no concern of it."""
    scores = x * scale
    if mask is not None:
        hides = mask.dtype == torch.bool
        scores = scores.masked_fill(mask, -torch.inf) if hides else scores + mask
    if causal:
        above = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device)
        scores = scores.masked_fill(above.triu(1 + x.shape[-1] - x.shape[-2]), -torch.inf)
    return scores.softmax(-1)


def with_gradient(call, x: Tensor, dy: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = call(x, SCALE, *arguments)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def gradient_of_saved(dy: Tensor, y: Tensor) -> Tensor:
    """Of an output that is saved rounded: computed exactly, and rounded once."""
    slope, weight = dy.double(), y.double()
    return (SCALE * weight * (slope - (slope * weight).sum(-1, keepdim=True))).to(y.dtype)


LENGTHS = (77, 1024, 4096, 5000, 16384, 20000, 32768, 50001)


@pytest.mark.parametrize(
    ("keys", "kind", "dtype"),
    [
        *((n, kind, torch.bfloat16) for n in LENGTHS for kind in ("none", "bool", "causal")),
        *((n, kind, torch.bfloat16) for n in (1, 8192, 20000) for kind in KINDS[2::2]),
        *((2048, kind, torch.float16) for kind in KINDS),
    ],
)
def test_error_is_that_of_torch_s_own(keys: int, kind: str, dtype: torch.dtype) -> None:
    x, dy, mask, causal = inputs(kind, 40 if keys > 2048 else 200, keys, dtype)
    poison(x)
    y, dx = with_gradient(softmax, x, dy, mask, causal)
    torchs_y, torchs_dx = with_gradient(eager, x, dy, mask, causal)
    want_y, want_dx = with_gradient(reference.softmax, x.double(), dy.double(), mask, causal)
    assert y.isfinite().all() and dx.isfinite().all()
    for mine, other, exact, best in (
        (y, torchs_y, want_y, want_y.to(dtype)),
        (dx, torchs_dx, want_dx, gradient_of_saved(dy, y)),
    ):
        error = (mine.double() - exact).abs()
        # Rows without a key are zeros here, and NaN of torch.
        limit = torch.where(other.isfinite(), (other.double() - exact).abs(), 0.0)
        # Torch's further roundings can happen to cancel that of the saved output in the largest
        # element of a dominant weight, but one element does not lower the mean error.
        least = (best.double() - exact).abs().max()
        assert error.max() <= max(1.1 * limit.max(), 1.01 * least) + 1e-7
        assert error.square().mean().sqrt() <= 1.1 * limit.square().mean().sqrt() + 1e-7


@pytest.mark.parametrize("kind", ["none", "added", "causal"])
@pytest.mark.parametrize("keys", [77, 8192, 20000, 40000])
def test_fp32(keys: int, kind: str) -> None:
    x, dy, mask, causal = inputs(kind, 40, keys, torch.float32)
    poison(x)
    ours = with_gradient(softmax, x, dy, mask, causal)
    want = with_gradient(reference.softmax, x.double(), dy.double(), mask, causal)
    error = [(mine - exact).abs().amax(-1) for mine, exact in zip(ours, want, strict=True)]
    most = [exact.abs().amax(-1) for exact in want]
    assert (error[0] <= 1e-5 * most[0]).all()
    # Where a single weight is nearly 1 the gradient cancels to what rounds off the incoming one.
    assert (error[1] <= 1e-5 * most[1] + 1e-6 * SCALE).all()


@pytest.mark.parametrize("queries", [1, 300, 9000])
def test_causal_with_other_numbers_of_queries_than_keys(queries: int) -> None:
    """The last query sees all keys; of 9000 queries of 8192 keys the first 808 see none."""
    x = torch.randn(2, queries, 8192, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn_like(x)
    poison(x)
    ours = with_gradient(softmax, x, dy, None, True)
    want = with_gradient(reference.softmax, x.double(), dy.double(), None, True)
    for mine, exact in zip(ours, want, strict=True):
        # A gradient that cancels is left with what rounds off the weights.
        torch.testing.assert_close(mine.double(), exact, rtol=2**-7, atol=SCALE * 2**-7)
        if queries > 8192:
            assert mine[:, : queries - 8192].eq(0).all()


def test_rows_without_a_key_and_infinite_scores() -> None:
    for keys in (100, 4096, 20000, 40000):
        x = torch.randn(4, keys, device="cuda", dtype=torch.bfloat16)
        x[0] = -torch.inf
        x[1, 1:] = -torch.inf
        x[2, 5] = torch.nan
        mask = torch.zeros(4, keys, dtype=torch.bool, device="cuda")
        mask[3] = True
        y, dx = with_gradient(softmax, x, torch.randn_like(x), mask)
        assert y[[0, 3]].eq(0).all() and dx[[0, 3]].eq(0).all()
        assert y[1, 0] == 1 and y[1, 1:].eq(0).all() and y[2].isnan().all()


def test_views_are_read_where_they_lie() -> None:
    wide = torch.randn(64, 6000, device="cuda", dtype=torch.bfloat16)
    for x in (wide[:, 3:5003], wide[::2], wide[:, ::2], wide.t()):
        dy = torch.ones(1, device="cuda", dtype=x.dtype).expand(x.shape)
        y, dx = with_gradient(softmax, x, dy * x)
        want, want_dx = with_gradient(softmax, x.contiguous(), (dy * x).contiguous())
        assert torch.equal(y, want) and torch.equal(dx, want_dx)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [1000, 8192, 20000, 40000])
def test_run_to_run_bitwise_equal(keys: int, causal: bool) -> None:
    x = torch.randn(2, 200, keys, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn_like(x)
    first = with_gradient(softmax, x, dy, None, causal)
    for _ in range(3):
        again = with_gradient(softmax, x, dy, None, causal)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_mask_is_not_expanded_in_memory() -> None:
    x = torch.randn(8, 16, 1024, 1024, device="cuda", dtype=torch.bfloat16)
    for mask in (
        torch.rand(8, 1, 1024, 1024, device="cuda") > 0.5,
        torch.randn(1, 16, 1, 1024, device="cuda"),
        torch.rand(1024, 1, device="cuda") > 0.5,
    ):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = softmax(x, SCALE, mask)
        assert torch.cuda.max_memory_allocated() - before <= 2 * x.numel() + 4096
        torch.testing.assert_close(
            y[5, 11].double(),
            reference.softmax(x.double(), SCALE, mask)[5, 11],
            rtol=2**-7,
            atol=1e-6,
        )
        del y


@pytest.mark.parametrize("mask", [None, "bool"])
def test_compiled_whole(mask: str | None) -> None:
    hides = None if mask is None else torch.rand(2, 1, 64, 512, device="cuda") > 0.5
    x = torch.randn(2, 4, 64, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        return softmax(x * 2, 0.3, hides, True).float().square().sum()

    (want,) = torch.autograd.grad(loss(x), x)
    (ours,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), x)
    torch.testing.assert_close(ours, want)


def test_captured_in_a_graph() -> None:
    x = torch.randn(4, 256, 2048, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn_like(x)
    mask = torch.rand(256, 2048, device="cuda") > 0.5

    def run() -> tuple[Tensor, Tensor]:
        y = fused._softmax_forward(x, mask, SCALE, True)
        return y, fused._softmax_backward(dy, y, SCALE, True)

    want = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for tensor in captured:
        tensor.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))


@pytest.mark.parametrize(
    ("shape", "causal"),
    [((66000, 32768), False), ((3, 27000, 27000), True), ((2**31 + 5, 1), False)],
)
def test_over_two_to_the_31_elements(shape: tuple[int, ...], causal: bool) -> None:
    x = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
    x.uniform_(-4, 4)
    poison(x)
    y = softmax(x, 1.0, None, causal)
    # The gradient of a sum of squares; what it needs is checked on a few of the rows.
    dx = fused._softmax_backward(x, y, 1.0, causal)
    for row in (0, shape[-2] // 2, shape[-2] - 1):
        at = (slice(None),) * (len(shape) - 2) + (row,)
        seen = row + 1 if causal else shape[-1]
        want = x[at].double()[..., :seen].softmax(-1)
        got = y[at][..., :seen].double()
        torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-9)
        dy = x[at][..., :seen].double()
        slope = got * (dy - (dy * got).sum(-1, keepdim=True))
        torch.testing.assert_close(dx[at][..., :seen].double(), slope, rtol=2**-6, atol=1e-6)
        assert y[at][..., seen:].eq(0).all() and dx[at][..., seen:].eq(0).all()


def test_masked_over_two_to_the_31_elements() -> None:
    heads, queries, keys = 40, 8192, 8192
    x = torch.empty(heads, queries, keys, device="cuda", dtype=torch.bfloat16).uniform_(-4, 4)
    assert x.numel() > 1 << 31
    mask = torch.rand(queries, keys, device="cuda") < 0.3
    y = softmax(x, 0.5, mask, False)
    dx = fused._softmax_backward(x, y, 0.5, False)
    for head in (0, heads - 1):
        part = softmax(x[head], 0.5, mask, False)
        assert torch.equal(y[head], part)
        assert torch.equal(dx[head], fused._softmax_backward(x[head], part, 0.5, False))
