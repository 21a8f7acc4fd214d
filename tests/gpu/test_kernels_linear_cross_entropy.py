"""The projection and its cross-entropy on a GPU, against fp64 and beside the two apart."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels import linear_cross_entropy, reference_cross_entropy
from megalite_kernels.products import accumulate_product_


@pytest.fixture(autouse=True)
def _seeded(monkeypatch):
    monkeypatch.delenv("MEGALITE_KERNELS", raising=False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    torch.manual_seed(0)


def inputs(rows: int, features: int, columns: int, dtype: torch.dtype = torch.bfloat16):
    hidden = torch.randn(rows, features, device="cuda").to(dtype)
    weight = (torch.randn(columns, features, device="cuda") * features**-0.5).to(dtype)
    targets = torch.randint(columns, (rows,), device="cuda")
    targets[1::5] = -100
    return hidden, weight, targets, torch.rand(rows, device="cuda")


def apart(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, upcast: bool = False):
    """(losses, dhidden, dweight), logits whole."""
    x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    logits = x @ w.t()
    losses = F.cross_entropy(logits.float() if upcast else logits, targets, reduction="none")
    dx, dw = torch.autograd.grad(losses, (x, w), weights.to(losses.dtype))
    return losses.detach(), dx, dw


def ours(hidden, weight, targets, weights, chunk=None, main_grad=None):
    x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    poison = [torch.full_like(t, torch.nan) for t in (hidden, weight, hidden @ weight.t())]
    del poison
    total, losses = linear_cross_entropy(x, w, targets, weights, main_grad, chunk)
    total.backward()
    return losses, x.grad, main_grad if main_grad is not None else w.grad


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("chunk", [None, 300])
@pytest.mark.parametrize(("rows", "features", "columns"), [(777, 512, 8000), (1024, 1024, 32000)])
def test_bf16_is_as_near_to_fp64_as_the_two_apart(
    rows: int, features: int, columns: int, chunk: int | None, given: bool
) -> None:
    arguments = inputs(rows, features, columns)
    hidden, weight, *rest = arguments
    exact = apart(hidden.double(), weight.double(), *rest)
    theirs = apart(*arguments, upcast=True)
    main_grad = torch.zeros_like(weight, dtype=torch.float32) if given else None
    for got, want, torchs in zip(ours(*arguments, chunk, main_grad), exact, theirs, strict=True):
        error, bound = (got - want).abs(), (torchs - want).abs()
        assert error.max() <= 1.1 * bound.max()
        assert error.square().mean().sqrt() <= 1.1 * bound.square().mean().sqrt()


@pytest.mark.parametrize("chunk", [None, 100])
def test_fp32(chunk: int | None) -> None:
    arguments = inputs(333, 256, 5000, torch.float32)
    hidden, weight, *rest = arguments
    exact = apart(hidden.double(), weight.double(), *rest)
    for got, want in zip(ours(*arguments, chunk), exact, strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_it_is_its_definition() -> None:
    hidden, weight, targets, weights = inputs(333, 256, 5000, torch.float32)
    results = []
    for run, chunk in (
        (linear_cross_entropy, (None, 100)),
        (reference_cross_entropy.linear_cross_entropy, ()),
    ):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        total, losses = run(x, w, targets, weights, *chunk, 4990, -100, 0.1, 1e-3)
        total.backward()
        results.append((total.detach(), losses, x.grad, w.grad))
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() <= 2e-5 * want.abs().max()


def test_a_kept_graph_does_not_see_what_becomes_of_a_gradient() -> None:
    hidden, weight, targets, weights = inputs(600, 512, 8000)
    leaves = [hidden.view(20, 30, 512).requires_grad_(), weight.requires_grad_()]
    tokens = (targets.view(20, 30), weights.view(20, 30))
    total, _ = linear_cross_entropy(*leaves, *tokens, chunk_rows=256)
    total.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    torch.nn.utils.clip_grad_norm_(leaves, 1e-3)
    for leaf in leaves:
        leaf.grad.data.zero_()
    total.backward(retain_graph=True)
    assert all(torch.equal(leaf.grad, want) for leaf, want in zip(leaves, once, strict=True))
    total.backward()
    assert all(torch.equal(leaf.grad, 2 * want) for leaf, want in zip(leaves, once, strict=True))


def test_the_weight_gradient_is_added_in_fp32() -> None:
    a = torch.randn(256, 512, device="cuda").bfloat16()
    b = torch.randn(512, 128, device="cuda").bfloat16()
    target = torch.randn(256, 128, device="cuda") * 100
    want = target.double() + a.double() @ b.double()
    accumulate_product_(target, a, b)
    assert (target - want).abs().max() <= 1e-5 * want.abs().max()
    target.fill_(torch.nan)
    accumulate_product_(target, a, b, keep=False)
    want = a.double() @ b.double()
    assert (target - want).abs().max() <= 1e-5 * want.abs().max()


def test_runs_are_bitwise_equal() -> None:
    arguments = inputs(2048, 1024, 32000)
    first, second = ours(*arguments, 1024), ours(*arguments, 1024)
    assert all(map(torch.equal, first, second))


def test_memory() -> None:
    rows, features, columns, chunk = 8192, 1024, 32000, 1024
    hidden, weight, targets, weights = inputs(rows, features, columns)
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    main_grad = torch.zeros(columns, features, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    total, _ = linear_cross_entropy(x, w, targets, weights, main_grad, chunk)
    total.backward()
    workspace, dhidden = 2 * chunk * columns, 2 * rows * features
    # Beside what is asked for: floats per token, and cuBLAS's own workspace.
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= workspace + dhidden + 64 * 2**20


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("given", [False, True])
def test_compiled_whole(given: bool) -> None:
    hidden, weight, targets, weights = inputs(600, 512, 8000)
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    main_grad = torch.zeros_like(weight, dtype=torch.float32) if given else None

    def loss(x: Tensor, w: Tensor, main_grad: Tensor | None) -> Tensor:
        return linear_cross_entropy(x * 2, w, targets, weights, main_grad, 256)[0]

    loss(x, w, main_grad).backward()
    want = [x.grad, main_grad.clone() if given else w.grad]
    x.grad = w.grad = None
    if given:
        main_grad.zero_()
    torch.compile(loss, fullgraph=True)(x, w, main_grad).backward()
    for got, right in zip([x.grad, main_grad if given else w.grad], want, strict=True):
        assert (got - right).abs().max() <= 0.01 * right.abs().max()


def test_captured_in_a_graph() -> None:
    arguments = inputs(600, 512, 8000)
    want = ours(*arguments, 256)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ours(*arguments, 256)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ours(*arguments, 256)
    graph.replay()
    assert all(map(torch.equal, got, want))
