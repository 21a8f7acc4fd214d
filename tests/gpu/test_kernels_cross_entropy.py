"""Cross-entropies on a GPU, against fp64 and beside torch's own, at full sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels import (
    cross_entropy,
    cross_entropy_with_grad,
    vocab_parallel_gradient_,
    vocab_parallel_statistics,
)

IGNORED = -100
WIDTHS = [33, 1000, 32000, 50257, 50304, 128256, 151936]
OPTIONS = [(0.0, 0.0), (0.1, 1e-4)]


@pytest.fixture(autouse=True)
def _seeded(monkeypatch):
    monkeypatch.delenv("MEGALITE_KERNELS", raising=False)
    torch.manual_seed(0)


def inputs(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, scale: float = 2.0):
    logits = (torch.randn(rows, columns, device="cuda") * scale).to(dtype)
    targets = torch.randint(columns, (rows,), device="cuda")
    targets[1::5] = IGNORED
    return logits, targets, torch.rand(rows, device="cuda")


def poison(*like: Tensor) -> None:
    """Leave NaN in the memory that the allocator hands out next."""
    buffers = [torch.full_like(x, torch.nan) for x in like for _ in range(2)]
    del buffers


def plain(logits: Tensor, targets: Tensor, weight: Tensor, smoothing: float, z_loss: float):
    """(losses, gradient of their weighted sum) by torch in the logits' dtype."""
    z = logits.detach().requires_grad_()
    losses = F.cross_entropy(
        z, targets, ignore_index=IGNORED, label_smoothing=smoothing, reduction="none"
    )
    if z_loss:
        square = z.logsumexp(1).square()
        losses = losses + z_loss * square.masked_fill(targets == IGNORED, 0)
    (gradient,) = torch.autograd.grad(losses, z, weight.to(losses.dtype))
    return losses.detach(), gradient


def ours(logits: Tensor, targets: Tensor, weight: Tensor, *options: float):
    leaf = logits.detach().requires_grad_()
    poison(logits, weight)
    losses = cross_entropy(leaf, targets, IGNORED, *options)
    poison(logits)
    (gradient,) = torch.autograd.grad(losses, leaf, weight)
    return losses.detach(), gradient


def ours_at_once(logits: Tensor, targets: Tensor, weight: Tensor, *options: float):
    given = logits.detach().clone().requires_grad_()
    poison(weight)
    total, losses = cross_entropy_with_grad(given, targets, weight, None, IGNORED, *options)
    (gradient,) = torch.autograd.grad(total, given)
    assert gradient.data_ptr() == given.data_ptr()
    want = (losses.double() * weight).sum()
    assert (total - want).abs() <= 1e-5 * want.abs()
    return losses, gradient


def errors(got: Tensor, exact: Tensor) -> tuple[float, float]:
    difference = got.double() - exact
    return difference.abs().max().item(), difference.square().mean().sqrt().item()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_is_as_near_to_fp64_as_torch(
    dtype: torch.dtype, columns: int, options: tuple[float, float]
) -> None:
    logits, targets, weight = inputs(300, columns, dtype)
    exact = plain(logits.double(), targets, weight, *options)
    theirs = plain(logits, targets, weight, *options)
    for run in (ours, ours_at_once):
        for got, want, torchs in zip(
            run(logits, targets, weight, *options), exact, theirs, strict=True
        ):
            for error, bound in zip(errors(got, want), errors(torchs, want), strict=True):
                assert error <= 1.1 * bound


@pytest.mark.parametrize("scale", [1e-4, 2.0, 100.0, 1e4])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("columns", WIDTHS)
def test_fp32(columns: int, options: tuple[float, float], scale: float) -> None:
    logits, targets, weight = inputs(60, columns, torch.float32, scale)
    exact = plain(logits.double(), targets, weight, *options)
    for run in (ours, ours_at_once):
        losses, gradient = run(logits, targets, weight, *options)
        assert (losses - exact[0]).abs().max() <= 1e-5 * exact[0].abs().max()
        # Where the target is all but certain, p - 1 is as exact as fp32 holds p.
        row_scale = exact[1].abs().amax(1, keepdim=True).clamp_min(0.05)
        assert ((gradient - exact[1]).abs() <= 1e-5 * row_scale).all()


@pytest.mark.parametrize("columns", [32000, 128256])
def test_runs_are_bitwise_equal(columns: int) -> None:
    logits, targets, weight = inputs(2000, columns)
    totals = []
    for run in (ours, ours_at_once):
        first, second = run(logits, targets, weight), run(logits, targets, weight)
        assert all(map(torch.equal, first, second))
    for _ in range(3):
        total, _ = cross_entropy_with_grad(logits.clone().requires_grad_(), targets, weight)
        totals.append(total.detach())
    assert torch.equal(totals[0], totals[1]) and torch.equal(totals[0], totals[2])


@pytest.mark.parametrize("columns", [32000, 50304, 128256])
def test_the_gradient_takes_no_memory(columns: int) -> None:
    logits, targets, weight = inputs(1024, columns)
    logits.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    total, _ = cross_entropy_with_grad(logits, targets, weight)
    assert torch.cuda.max_memory_allocated() - before <= 64 * 1024
    del total


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("columns", [32000, 50257, 128256, 151936])
def test_a_masked_row_gets_no_gradient_whatever_it_holds(
    columns: int, bad: float, options: tuple[float, float]
) -> None:
    logits, targets, weight = inputs(600, columns)
    masked = torch.zeros(600, dtype=torch.bool, device="cuda")
    masked[::3] = True
    weight[masked] = 0
    clean = logits.clone()
    logits[masked, 5::77] = bad
    logits[1::5, -1] = bad  # these are ignored
    _, want = ours(clean, targets, weight, *options)
    _, want_at_once = ours_at_once(clean, targets, weight, *options)
    given = logits.clone().requires_grad_()
    total, _ = cross_entropy_with_grad(given, targets, weight, None, IGNORED, *options)
    (gradient,) = torch.autograd.grad(total, given)
    assert total.isfinite() and torch.equal(gradient, want_at_once)
    assert torch.equal(ours(logits, targets, weight, *options)[1], want)
    assert not gradient[masked].any() and not want[masked].any()


@pytest.mark.parametrize("columns", [32000, 128256])
def test_a_kept_graph_does_not_see_what_becomes_of_a_gradient(columns: int) -> None:
    logits, targets, weight = inputs(64, columns)
    leaf = logits.requires_grad_()
    total, _ = cross_entropy_with_grad(leaf, targets, weight)
    total.backward(retain_graph=True)
    once = leaf.grad.clone()
    torch.nn.utils.clip_grad_norm_([leaf], 1e-3)
    leaf.grad.data.zero_()
    total.backward(retain_graph=True)
    assert torch.equal(leaf.grad, once)
    total.backward()
    assert torch.equal(leaf.grad, 2 * once)


@pytest.mark.parametrize("columns", [32000, 128256])
def test_minus_infinity(columns: int) -> None:
    logits, targets, weight = inputs(64, columns)
    logits[:, ::3] = -torch.inf
    logits[:, : columns // 2] = -torch.inf
    targets = torch.where(targets == IGNORED, targets, columns - 2 - columns % 3)
    logits.scatter_(1, targets.clamp_min(0)[:, None], 1.0)
    exact = plain(logits.double(), targets, weight, 0.0, 0.0)
    for run in (ours, ours_at_once):
        losses, gradient = run(logits, targets, weight)
        assert not gradient.isnan().any()
        assert (losses - exact[0]).abs().max() <= 1e-5 * exact[0].abs().max()
        assert (gradient - exact[1]).abs().max() <= 0.01 * exact[1].abs().max()


@pytest.mark.parametrize(("width", "vocab"), [(32128, 32000), (128512, 128256), (64, 33)])
def test_padding_and_strided_rows(width: int, vocab: int) -> None:
    wide = torch.randn(100, width + 64, device="cuda").bfloat16()
    logits = wide[:, :width]
    logits[:, vocab:] = 60.0
    wide[:, width:] = 7.0
    targets = torch.randint(vocab, (100,), device="cuda")
    weight = torch.rand(100, device="cuda")
    exact = plain(logits[:, :vocab].double(), targets, weight, 0.0, 0.0)
    total, losses = cross_entropy_with_grad(logits.requires_grad_(), targets, weight, vocab)
    (gradient,) = torch.autograd.grad(total, logits)
    assert (losses - exact[0]).abs().max() <= 1e-5 * exact[0].abs().max()
    assert (gradient[:, :vocab] - exact[1]).abs().max() <= 0.01 * exact[1].abs().max()
    assert not gradient[:, vocab:].any()
    assert (wide[:, width:] == 7).all()


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_cut_vocabulary(ranks: int, options: tuple[float, float]) -> None:
    logits, targets, weight = inputs(500, 128256)
    targets.clamp_min_(0)
    want_losses, want = plain(logits.double(), targets, weight, *options)
    log_sum = logits.double().logsumexp(1)
    _, theirs = plain(logits, targets, weight, *options)
    statistics, gradients = [], []
    for rank, part in enumerate(logits.chunk(ranks, dim=1)):
        part, first = part.contiguous(), rank * part.shape[1]
        real = part.shape[1]
        statistics.append(vocab_parallel_statistics(part, targets, first, real))
        without = vocab_parallel_statistics(part, targets, first, real, False)
        assert torch.allclose(without[:, :3], statistics[-1][:, :3], rtol=1e-6, atol=0)
        assert not without[:, 3].any()
        vocab_parallel_gradient_(
            part, targets, log_sum, weight, first, real, logits.shape[1], *options
        )
        gradients.append(part)
    parts = torch.stack(statistics).double()
    maximum = parts[..., 0].amax(0)
    got = maximum + (parts[..., 1] * (parts[..., 0] - maximum).exp()).sum(0).log()
    assert (got - log_sum).abs().max() <= 1e-5 * log_sum.max()
    at_target, total = parts[..., 2].sum(0), parts[..., 3].sum(0)
    smoothing, z_loss = options
    losses = got - (1 - smoothing) * at_target - smoothing * total / logits.shape[1]
    losses = losses + z_loss * got.square()
    assert (losses - want_losses).abs().max() <= 1e-5 * want_losses.max()
    for error, bound in zip(
        errors(torch.cat(gradients, 1), want), errors(theirs, want), strict=True
    ):
        assert error <= 1.1 * bound


def test_more_than_2_to_the_31_elements() -> None:
    rows, columns = 16800, 128256
    logits = torch.empty(rows, columns, device="cuda", dtype=torch.bfloat16)
    logits[:1000].normal_()
    for start in range(1000, rows, 1000):
        logits[start : start + 1000] = logits[: min(1000, rows - start)]
    targets = torch.randint(columns, (1000,), device="cuda").repeat(17)[:rows]
    weight = torch.rand(1000, device="cuda").repeat(17)[:rows]
    last = slice(rows - 800, rows)
    want_losses, want = plain(logits[last].float(), targets[last], weight[last], 0.0, 0.0)
    leaf = logits.requires_grad_()
    losses = cross_entropy(leaf, targets)
    (gradient,) = torch.autograd.grad(losses, leaf, weight)
    assert torch.equal(gradient[last], gradient[:800])
    assert torch.equal(losses[last], losses[:800])
    assert (losses[last] - want_losses).abs().max() <= 1e-4
    assert (gradient[last] - want).abs().max() <= 0.01 * want.abs().max()
    del gradient
    statistics = vocab_parallel_statistics(logits.detach(), targets, 0, columns)
    assert torch.equal(statistics[last], statistics[:800])
    total, losses = cross_entropy_with_grad(leaf, targets, weight)
    (gradient,) = torch.autograd.grad(total, leaf)
    assert torch.equal(gradient[last], gradient[:800])
    assert torch.equal(losses[last], losses[:800])
    assert (gradient[last] - want).abs().max() <= 0.01 * want.abs().max()


@pytest.mark.filterwarnings("ignore")
def test_compiled_whole() -> None:
    logits, targets, weight = inputs(512, 32000)
    source = logits.requires_grad_()

    def loss(z: Tensor) -> Tensor:
        total, _ = cross_entropy_with_grad(z * 2, targets, weight)
        return total + (cross_entropy(z, targets, IGNORED, 0.1, 1e-4) * weight).sum()

    loss(source).backward()
    want, source.grad = source.grad, None
    torch.compile(loss, fullgraph=True)(source).backward()
    assert (source.grad - want).abs().max() <= 0.01 * want.abs().max()


def test_captured_in_a_graph() -> None:
    logits, targets, weight = inputs(512, 50304)
    leaf = logits.clone().requires_grad_()

    def step() -> tuple[Tensor, Tensor, Tensor]:
        losses = cross_entropy(leaf, targets)
        (first,) = torch.autograd.grad(losses, leaf, weight)
        total, _ = cross_entropy_with_grad(leaf * 1, targets, weight)
        (second,) = torch.autograd.grad(total, leaf)
        return losses.detach(), first, second

    want = step()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for x in got:
        x.fill_(torch.nan)
    graph.replay()
    assert all(map(torch.equal, got, want))
