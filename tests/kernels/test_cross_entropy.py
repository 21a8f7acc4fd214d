"""cross_entropy and cross_entropy_with_grad against torch's in fp64, kernels and plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels import cross_entropy, cross_entropy_with_grad, use_backend
from megalite_kernels.fused import cross_entropy as fused
from megalite_kernels.fused.cross_entropy_rows import Walk

BOUND = {torch.float32: 1e-5, torch.float16: 2e-3}
OPTIONS = ((0.0, 0.0), (0.1, 0.0), (0.0, 0.02), (0.2, 1e-3))
IGNORED = -100


@pytest.fixture(params=["triton", "torch"], autouse=True)
def back_end(request: pytest.FixtureRequest):
    with use_backend(request.param):
        yield request.param


def inputs(rows: int, columns: int, dtype=torch.float32, scale=3.0, seed=0, classes=None):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, columns, generator=generator) * scale).to(dtype)
    targets = torch.randint(classes or columns, (rows,), generator=generator)
    targets[1::3] = IGNORED
    return logits, targets, torch.rand(rows, generator=generator)


def exact(logits: Tensor, targets: Tensor, weight: Tensor, smoothing=0.0, z_loss=0.0):
    """(losses, gradient of their weighted sum), fp64."""
    z = logits.detach().double().requires_grad_()
    losses = F.cross_entropy(
        z, targets, ignore_index=IGNORED, label_smoothing=smoothing, reduction="none"
    )
    if z_loss:
        square = z.logsumexp(1).square()
        losses = losses + z_loss * square.masked_fill(targets == IGNORED, 0)
    (losses * weight.double()).sum().backward()
    return losses.detach(), z.grad


def close(got: Tensor, want: Tensor, bound: float) -> None:
    assert got.shape == want.shape
    if want.numel():
        scale = want.abs().amax(-1, keepdim=True).clamp_min(1e-30)
        assert ((got.double() - want).abs() / scale).max() < bound


def check(logits: Tensor, targets: Tensor, weight: Tensor, *options: float) -> None:
    want, want_gradient = exact(logits, targets, weight, *options)
    bound = BOUND[logits.dtype]
    leaf = logits.detach().requires_grad_()
    before = leaf.detach().clone()
    losses = cross_entropy(leaf, targets, IGNORED, *options)
    assert losses.dtype == torch.float32
    close(losses, want, 1e-5)
    (gradient,) = torch.autograd.grad(losses, leaf, weight)
    close(gradient, want_gradient, bound)
    assert torch.equal(leaf, before)
    source = logits.detach().clone().requires_grad_()
    given = source * 1
    total, losses = cross_entropy_with_grad(given, targets, weight, None, IGNORED, *options)
    close(losses, want, 1e-5)
    close(total[None], (want * weight.double()).sum()[None], 1e-5)
    total.backward()
    close(source.grad, want_gradient, bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("columns", [1, 7, 33, 1000, 1024])
def test_widths(columns: int, dtype: torch.dtype) -> None:
    check(*inputs(5, columns, dtype))


@pytest.mark.parametrize("options", OPTIONS)
def test_options(options: tuple[float, float]) -> None:
    check(*inputs(6, 257), *options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("columns", [1000, 1024, 1100, 1555, 1600])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_rows_longer_than_the_registers(
    monkeypatch: pytest.MonkeyPatch, columns: int, smoothing: float, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(fused, "choose_walk", lambda *_: Walk(128, 4, 1, 64))
    check(*inputs(7, columns, dtype), smoothing, 0.01)


@pytest.mark.parametrize("scale", [1e-6, 300.0, 1e4, 1e30])
def test_huge_and_tiny(scale: float) -> None:
    check(*inputs(6, 300, scale=scale))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_logits_of_minus_infinity(smoothing: float) -> None:
    logits, targets, weight = inputs(6, 70)
    logits[:, ::2] = -torch.inf
    logits[0, 1:] = -torch.inf
    logits[0, 0] = 2.0
    targets = torch.where(targets == IGNORED, targets, targets // 2 * 2 + 1)
    targets[0] = 0
    want, _ = exact(logits, targets, weight, smoothing)
    losses = cross_entropy(logits, targets, IGNORED, smoothing)
    assert torch.equal(losses.isinf(), want.isinf())
    close(losses.nan_to_num(posinf=0.0)[None], want.nan_to_num(posinf=0.0)[None], 1e-5)
    if not smoothing:
        check(logits, targets, weight)


def test_a_weight_of_zero_silences_an_infinite_loss() -> None:
    logits, targets, weight = inputs(4, 20)
    logits[0, targets[0]] = -torch.inf
    weight[0] = 0
    total, losses = cross_entropy_with_grad(logits.requires_grad_() * 1, targets, weight)
    assert losses[0].isinf() and total.isfinite()
    total.backward()
    assert not logits.grad[0].any()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("walked", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_masked_row_gets_no_gradient_whatever_it_holds(
    monkeypatch: pytest.MonkeyPatch, walked: bool, smoothing: float, bad: float
) -> None:
    if walked:
        monkeypatch.setattr(fused, "choose_walk", lambda *_: Walk(128, 4, 1, 64))
    logits, targets, weight = inputs(6, 300, classes=290)
    _, want = exact(logits[:, :290], targets, weight, smoothing, 0.01)
    weight[0] = 0
    want[0] = 0
    logits[:2, 3::7] = bad  # the second token is ignored
    source = logits.requires_grad_()
    total, _ = cross_entropy_with_grad(
        source * 1, targets, weight, 290, label_smoothing=smoothing, z_loss=0.01
    )
    total.backward()
    assert total.isfinite()
    assert not source.grad[:2].any()
    close(source.grad[:, :290], want, 1e-5)


def test_all_ignored() -> None:
    logits, targets, weight = inputs(4, 50)
    check(logits, targets.fill_(IGNORED), weight, 0.1, 0.1)


def test_zero_rows() -> None:
    check(*inputs(0, 50))


def test_another_index_is_ignored() -> None:
    logits, targets, _ = inputs(6, 40)
    targets = targets.clamp_min(0)
    targets[2:4] = 7
    want = F.cross_entropy(logits, targets, ignore_index=7, reduction="none")
    close(cross_entropy(logits, targets, 7), want.double(), 1e-5)


def test_leading_shape_and_strides() -> None:
    logits, targets, weight = inputs(12, 90)
    wide = torch.zeros(12, 128)
    wide[:, :90] = logits
    check(wide[:, :90], targets, weight)
    check(logits.t().contiguous().t(), targets, weight)
    check(logits[:1].expand(12, 90), targets, weight)
    want, want_gradient = exact(logits, targets, weight)
    source = logits.view(3, 4, 90).transpose(0, 1).requires_grad_()
    targets, weight = targets.view(3, 4).t(), weight.view(3, 4).t()
    total, losses = cross_entropy_with_grad(source * 1, targets, weight)
    total.backward()
    close(losses.t(), want.view(3, 4), 1e-5)
    close(source.grad.transpose(0, 1).reshape(12, 90), want_gradient, 1e-5)
    close(cross_entropy(source, targets).t(), want.view(3, 4), 1e-5)


@pytest.mark.parametrize(("classes", "columns"), [(33, 40), (500, 512), (700, 2500)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_padding(
    monkeypatch: pytest.MonkeyPatch, classes: int, columns: int, smoothing: float
) -> None:
    monkeypatch.setattr(fused, "choose_walk", lambda *_: Walk(128, 4, 1, 64))
    logits, targets, weight = inputs(5, columns, classes=classes)
    logits[:, classes:] = 60.0
    want, want_gradient = exact(logits[:, :classes], targets, weight, smoothing)
    source = logits.requires_grad_()
    total, losses = cross_entropy_with_grad(
        source * 1, targets, weight, classes, label_smoothing=smoothing
    )
    close(losses, want, 1e-5)
    total.backward()
    close(source.grad[:, :classes], want_gradient, 1e-5)
    assert not source.grad[:, classes:].any()
    with torch.no_grad():
        again = cross_entropy_with_grad(source, targets, weight, classes, label_smoothing=smoothing)
    close(again[0][None], total.double()[None], 1e-6)
    close(again[1], want, 1e-5)


def test_the_gradient_lies_in_the_logits_place() -> None:
    logits, targets, weight = inputs(4, 60)
    source = logits.requires_grad_()
    given = source * 1
    total, losses = cross_entropy_with_grad(given, targets, weight)
    assert total.requires_grad and not losses.requires_grad
    (first,) = torch.autograd.grad(total, given, retain_graph=True)
    assert first.data_ptr() == given.data_ptr()
    first = first.clone()
    (second,) = torch.autograd.grad(total, given, retain_graph=True)
    assert torch.equal(first, second)
    total.backward(retain_graph=True)
    total.backward(retain_graph=True)
    total.backward()
    close(source.grad, 3 * first.double(), 1e-6)


def test_a_leaf_gets_the_same_gradient_from_a_kept_graph() -> None:
    logits, targets, weight = inputs(4, 60)
    leaf = logits.requires_grad_()
    total, _ = cross_entropy_with_grad(leaf, targets, weight)
    total.backward(retain_graph=True)
    once = leaf.grad.clone()
    total.backward(retain_graph=True)
    total.backward()
    close(leaf.grad, 3 * once.double(), 1e-6)


@pytest.mark.parametrize("zero", [Tensor.zero_, lambda grad: grad.data.zero_()])
def test_a_kept_graph_does_not_see_what_becomes_of_a_gradient(zero) -> None:
    logits, targets, weight = inputs(6, 60)
    leaf = logits.view(3, 2, 60).requires_grad_()
    total, _ = cross_entropy_with_grad(leaf, targets.view(3, 2), weight.view(3, 2))
    total.backward(retain_graph=True)
    once = leaf.grad.clone()
    torch.nn.utils.clip_grad_norm_([leaf], 1e-3)
    zero(leaf.grad)
    for times in (1, 2, 3):
        total.backward(retain_graph=True)
        close(leaf.grad.view(6, 60), times * once.view(6, 60).double(), 1e-6)


def test_without_gradients_the_logits_stay() -> None:
    logits, targets, weight = inputs(4, 60)
    before = logits.clone()
    total, _ = cross_entropy_with_grad(logits, targets, weight)
    assert not total.requires_grad
    with torch.no_grad():
        cross_entropy_with_grad(logits.requires_grad_(), targets, weight)
    assert torch.equal(logits, before)


def test_writing_to_logits_that_were_given_away_is_noticed() -> None:
    logits, targets, weight = inputs(4, 60)
    given = logits.requires_grad_() * 1
    total, _ = cross_entropy_with_grad(given, targets, weight)
    with torch.no_grad():
        given.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_a_backward_that_needs_the_logits_is_noticed() -> None:
    logits, targets, weight = inputs(4, 60)
    total, _ = cross_entropy_with_grad(logits.requires_grad_().exp(), targets, weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("columns", [40, 300])
def test_a_target_that_does_not_exist_has_the_loss_nan(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    """Padding, too, is no class; a weight of 0 silences such a target like any other."""
    monkeypatch.setattr(fused, "choose_walk", lambda *_: Walk(128, 4, 1, 64))
    logits, targets, weight = inputs(8, columns, classes=30)
    targets[:] = torch.tensor([3, -1, 30, columns, 2**40, -(2**40), IGNORED, 29])
    missing = torch.tensor([False, True, True, True, True, True, False, False])
    want, _ = exact(logits[:, :30], targets.masked_fill(missing, IGNORED), weight, 0.1)

    def losses_of(weight: Tensor) -> tuple[Tensor, Tensor]:
        arguments = (targets, weight, 30, IGNORED, 0.1)
        return cross_entropy_with_grad(logits.clone().requires_grad_() * 1, *arguments)

    with torch.no_grad():
        plain = cross_entropy(logits[:, :30], targets, IGNORED, 0.1)
        without = losses_of(weight)
    for losses in (plain, without[1], losses_of(weight)[1]):
        assert torch.equal(losses.isnan(), missing)
        close(losses.nan_to_num(0.0)[None], want[None], 1e-5)
    for total in (without[0], losses_of(weight)[0]):
        assert total.isnan()
    close(losses_of(weight.masked_fill(missing, 0.0))[0][None], (want * weight).sum()[None], 1e-5)


@pytest.mark.filterwarnings("ignore")
def test_compiled(back_end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALITE_KERNELS", back_end)
    logits, targets, weight = inputs(6, 130)
    source = logits.clone().requires_grad_()

    def loss(z: Tensor) -> Tensor:
        total, losses = cross_entropy_with_grad(z * 2, targets, weight)
        return total + 0 * losses.sum() + (cross_entropy(z, targets) * weight).sum()

    with torch.profiler.profile() as profile:
        torch.compile(loss, fullgraph=True, backend="aot_eager")(source).backward()
    got, source.grad = source.grad, None
    loss(source).backward()
    close(got, source.grad.double(), 1e-6)
    called = {event.key for event in profile.key_averages()}
    names = ("loss_and_new_gradient", "losses_and_log_sums", "gradient_of_losses")
    wanted = {f"megalite::{name}" for name in names}
    assert wanted & called == (wanted if back_end == "triton" else set())
