"""linear_cross_entropy against the whole logits' loss in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels import (
    linear_cross_entropy,
    reference_cross_entropy,
    use_backend,
)
from megalite_kernels.fused.linear_cross_entropy import even_chunks
from megalite_kernels.products import accumulate_product_

IGNORED = -100


@pytest.fixture(params=["triton", "torch"], autouse=True)
def back_end(request: pytest.FixtureRequest):
    with use_backend(request.param):
        yield request.param


def inputs(rows: int, features: int = 12, columns: int = 50, classes: int | None = None):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, features, generator=generator)
    weight = torch.randn(columns, features, generator=generator)
    targets = torch.randint(classes or columns, (rows,), generator=generator)
    targets[1::4] = IGNORED
    return hidden, weight, targets, torch.rand(rows, generator=generator)


def exact(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, classes=None, s=0.0):
    x, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = (x @ w.t())[:, : classes or weight.shape[0]]
    losses = F.cross_entropy(
        logits, targets, ignore_index=IGNORED, label_smoothing=s, reduction="none"
    )
    total = (losses * weights.double()).sum()
    total.backward()
    return total.detach(), losses.detach(), x.grad, w.grad


def close(got: Tensor, want: Tensor, bound: float = 1e-5) -> None:
    assert got.shape == want.shape
    if want.numel():
        assert (got.double() - want).abs().max() <= bound * want.abs().max()


@pytest.mark.parametrize("chunk_rows", [None, 1, 5, 13])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("classes", "smoothing"), [(None, 0.0), (41, 0.1)])
def test_gradients(
    chunk_rows: int | None, given: bool, classes: int | None, smoothing: float
) -> None:
    hidden, weight, targets, weights = inputs(13, classes=classes)
    total_, losses_, dx, dw = exact(hidden, weight, targets, weights, classes, smoothing)
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    main_grad = torch.ones(weight.shape) if given else None
    total, losses = linear_cross_entropy(
        x, w, targets, weights, main_grad, chunk_rows, classes, label_smoothing=smoothing
    )
    assert total.requires_grad and not losses.requires_grad
    total.backward(retain_graph=True)
    close(total, total_)
    close(losses, losses_)
    close(x.grad, dx)
    if main_grad is None:
        close(w.grad, dw)
    else:
        assert w.grad is None
        close(main_grad - 1, dw)
    total.backward()
    close(x.grad, 2 * dx)


@pytest.mark.parametrize(
    ("back_end", "dtype"),
    # Triton's interpreter rounds to bf16 in its own way.
    [("triton", torch.float16), ("torch", torch.float16), ("torch", torch.bfloat16)],
    indirect=["back_end"],
)
def test_half(back_end: str, dtype: torch.dtype) -> None:
    hidden, weight, targets, weights = inputs(16)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    _, losses_, dx, dw = exact(hidden, weight, targets, weights)
    main_grad = torch.zeros(weight.shape)
    total, losses = linear_cross_entropy(
        hidden.requires_grad_(), weight.requires_grad_(), targets, weights, main_grad, 5
    )
    total.backward()
    assert losses.dtype == torch.float32 and hidden.grad.dtype == dtype
    close(losses, losses_, 0.02)
    close(hidden.grad, dx, 0.02)
    close(main_grad, dw, 0.02)


@pytest.mark.parametrize("chunk_rows", [None, 5])
@pytest.mark.parametrize("options", [(), (41, IGNORED, 0.1, 0.01)])
def test_it_is_its_definition(chunk_rows: int | None, options: tuple) -> None:
    *inputs_, targets, weights = inputs(13, classes=41)
    results = []
    for run in (
        reference_cross_entropy.linear_cross_entropy,
        lambda *given: linear_cross_entropy(*given[:4], None, chunk_rows, *given[4:]),
    ):
        x, w = (tensor.clone().requires_grad_() for tensor in inputs_)
        total, losses = run(x, w, targets, weights, *options)
        total.backward()
        results.append((total.detach(), losses, x.grad, w.grad))
    for got, want in zip(*reversed(results), strict=True):
        close(got, want.double())


@pytest.mark.parametrize("zero", [Tensor.zero_, lambda grad: grad.data.zero_()])
@pytest.mark.parametrize("chunk_rows", [None, 5])
def test_a_kept_graph_does_not_see_what_becomes_of_a_gradient(chunk_rows: int | None, zero) -> None:
    hidden, weight, targets, weights = inputs(12)
    leaves = [hidden.view(3, 4, 12).requires_grad_(), weight.requires_grad_()]
    tokens = (targets.view(3, 4), weights.view(3, 4))
    total, _ = linear_cross_entropy(*leaves, *tokens, chunk_rows=chunk_rows)
    total.backward(retain_graph=True)
    once = [leaf.grad.clone().double() for leaf in leaves]
    torch.nn.utils.clip_grad_norm_(leaves, 1e-3)
    for leaf in leaves:
        zero(leaf.grad)
    for times in (1, 2, 3):
        total.backward(retain_graph=True)
        for leaf, want in zip(leaves, once, strict=True):
            close(leaf.grad, times * want, 1e-6)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_a_masked_token_whose_logits_overflow_adds_nothing(chunk_rows: int | None) -> None:
    hidden, weight, targets, weights = inputs(8)
    hidden[0] = 1e38
    weights[0] = 0
    _, _, dx, dw = exact(hidden[1:], weight, targets[1:], weights[1:])
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    total, _ = linear_cross_entropy(x, w, targets, weights, chunk_rows=chunk_rows)
    total.backward()
    assert total.isfinite() and not x.grad[0].any()
    close(x.grad[1:], dx)
    close(w.grad, dw)


@pytest.mark.parametrize("wanted", ["hidden", "weight", "main_grad", "none"])
def test_only_what_is_wanted(wanted: str) -> None:
    hidden, weight, targets, weights = inputs(8)
    total_, _, dx, dw = exact(hidden, weight, targets, weights)
    hidden.requires_grad_(wanted == "hidden")
    weight.requires_grad_(wanted in ("weight", "main_grad"))
    main_grad = torch.zeros(weight.shape) if wanted in ("main_grad", "none") else None
    total, _ = linear_cross_entropy(hidden, weight, targets, weights, main_grad, 3)
    close(total, total_)
    assert total.requires_grad == (wanted != "none")
    if wanted != "none":
        total.backward()
    if wanted == "hidden":
        close(hidden.grad, dx)
    elif wanted == "weight":
        close(weight.grad, dw)
    elif wanted == "main_grad":
        close(main_grad, dw)
    else:
        assert not main_grad.any()


def test_without_gradients_nothing_is_accumulated() -> None:
    hidden, weight, targets, weights = inputs(8)
    main_grad = torch.zeros(weight.shape)
    with torch.no_grad():
        total, _ = linear_cross_entropy(
            hidden.requires_grad_(), weight.requires_grad_(), targets, weights, main_grad
        )
    assert not total.requires_grad and not main_grad.any()


@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_zero_rows(chunk_rows: int | None) -> None:
    hidden, weight, targets, weights = inputs(0)
    weight.requires_grad_()
    total, losses = linear_cross_entropy(hidden, weight, targets, weights, chunk_rows=chunk_rows)
    total.backward()
    assert total == 0 and losses.shape == (0,) and not weight.grad.any()


def test_leading_shape() -> None:
    hidden, weight, targets, weights = inputs(12)
    total_, losses_, dx, _ = exact(hidden, weight, targets, weights)
    x = hidden.view(3, 4, 12).transpose(0, 1).requires_grad_()
    total, losses = linear_cross_entropy(
        x, weight, targets.view(3, 4).t(), weights.view(3, 4).t(), chunk_rows=5
    )
    total.backward()
    close(total, total_)
    close(losses.t(), losses_.view(3, 4))
    close(x.grad.transpose(0, 1).reshape(12, 12), dx)


def test_chunks_are_even() -> None:
    assert even_chunks(777, 200) == 195
    assert even_chunks(777, 8192) == 777
    assert even_chunks(0, 8192) == 1
    assert even_chunks(8192, 8192) == 8192


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulate_product(dtype: torch.dtype) -> None:
    a, b = torch.randn(7, 9).to(dtype), torch.randn(9, 5).to(dtype)
    target = torch.ones(7, 5)
    accumulate_product_(target, a, b)
    close(target, 1 + a.double() @ b.double(), 1e-6)
    target.fill_(torch.nan)
    accumulate_product_(target, a, b, keep=False)
    close(target, a.double() @ b.double(), 1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("given", [False, True])
def test_compiled(given: bool, back_end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALITE_KERNELS", back_end)
    hidden, weight, targets, weights = inputs(9)
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    buffers = [torch.zeros(weight.shape) if given else None for _ in range(2)]
    _, _, dx, dw = exact(hidden, weight, targets, weights)

    def loss(x: Tensor, w: Tensor, main_grad: Tensor | None) -> Tensor:
        return linear_cross_entropy(x, w, targets, weights, main_grad, 4)[0]

    with torch.profiler.profile() as profile:
        torch.compile(loss, fullgraph=True, backend="aot_eager")(x, w, buffers[0]).backward()
    called = {event.key for event in profile.key_averages()}
    assert "megalite::linear_loss_and_gradients" in called
    close(x.grad, dx)
    close(buffers[0] if given else w.grad, dw)
