"""The definitions in plain torch, which serve CPUs and fp64: against what torch itself computes,
and their gradients against differences. No kernel runs here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from megalite_kernels import (
    adamw_,
    cross_entropy,
    cross_entropy_with_grad,
    linear_cross_entropy,
    reference,
)

EPS = 1e-5
IGNORED = -100
LAYOUTS = ["half", "interleaved"]
LOSS_OPTIONS = ((0.0, 0.0), (0.1, 0.0), (0.0, 0.02), (0.2, 1e-3))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def doubles(*shape: int, leaf: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=leaf)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


# RMSNorm


@pytest.mark.parametrize("casting", ["fp32", "llama", "gemma"])
def test_rms_norm(casting: str) -> None:
    x, residual, weight = doubles(3, 7), doubles(3, 7), doubles(7)
    factor = weight + 1 if casting == "gemma" else weight
    y, total = reference.add_rms_norm(x, residual, weight, EPS, casting)
    close(total, x + residual)
    close(y, F.rms_norm(x + residual, (7,), factor, EPS))
    close(reference.rms_norm(x, weight, EPS, casting), F.rms_norm(x, (7,), factor, EPS))
    assert gradcheck(lambda *t: reference.rms_norm(*t, EPS, casting), (x, weight))
    assert gradcheck(lambda *t: reference.add_rms_norm(*t, EPS, casting), (x, residual, weight))


# RoPE


def turned_by_complex_numbers(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Pairs as complex numbers times e^(i angle)."""
    half = cos.shape[-1]
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = turning.unflatten(-1, (2, half) if layout == "half" else (half, 2))
    pairs = pairs.transpose(-1, -2) if layout == "half" else pairs
    turned = torch.complex(*pairs.unbind(-1)) * torch.complex(cos, sin)[:, :, None]
    turned = torch.stack([turned.real, turned.imag], -1)
    turned = turned.transpose(-1, -2) if layout == "half" else turned
    return torch.cat([turned.flatten(-2), rest], -1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("length", "batch", "heads", "kv_heads", "dim", "rotated"),
    [(3, 2, 4, 2, 8, 8), (5, 1, 3, 1, 10, 6), (1, 3, 6, 6, 16, 2), (0, 2, 4, 2, 8, 8)],
)
def test_rope(
    length: int, batch: int, heads: int, kv_heads: int, dim: int, rotated: int, layout: str
) -> None:
    angles = 100 * doubles(length, batch, rotated // 2, leaf=False)
    cos, sin = angles.cos(), angles.sin()
    q, k, v = (doubles(length, batch, n, dim) for n in (heads, kv_heads, kv_heads))
    for got, x in zip(reference.rope(q, k, cos, sin, layout), (q, k), strict=True):
        close(got, turned_by_complex_numbers(x, cos, sin, layout))
        assert got.is_contiguous()
    packed = torch.cat([x.flatten(2) for x in (q, k, v)], -1)
    parts = reference.rope_packed(packed, cos, sin, heads, kv_heads, layout)
    for got, want in zip(parts, (*reference.rope(q, k, cos, sin, layout), v), strict=True):
        close(got, want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_rope(layout: str) -> None:
    angles = doubles(3, 1, 2, leaf=False)
    cos, sin = angles.cos(), angles.sin()
    q, k, qkv = doubles(3, 2, 4, 6), doubles(3, 2, 2, 6), doubles(3, 2, 8 * 6)
    assert gradcheck(lambda q, k: reference.rope(q, k, cos, sin, layout), (q, k))
    assert gradcheck(lambda x: reference.rope_packed(x, cos, sin, 4, 2, layout), (qkv,))


# Softmax


@pytest.mark.parametrize("kind", ["none", "bool", "added"])
@pytest.mark.parametrize("causal", [False, True])
def test_softmax(causal: bool, kind: str) -> None:
    x = doubles(2, 1, 3, 4)
    hidden = torch.rand(2, 1, 3, 4) > 0.6
    hidden[..., 0] = False  # a key is left to every row
    mask = {"none": None, "bool": hidden, "added": doubles(4, leaf=False)}[kind]
    scores = 0.7 * x
    if kind == "bool":
        scores = scores.masked_fill(hidden, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    if causal:  # the last query sees all keys
        later = torch.ones(3, 4, dtype=torch.bool).triu(2)
        scores = scores.masked_fill(later, -torch.inf)
    close(reference.softmax(x, 0.7, mask, causal), scores.softmax(-1))
    assert gradcheck(lambda x: reference.softmax(x, 0.7, mask, causal), x)


# SwiGLU


def test_swiglu() -> None:
    gate_up = doubles(3, 2, 10)
    gate, up = gate_up.chunk(2, -1)
    close(reference.swiglu(gate_up), F.silu(gate) * up)
    assert gradcheck(reference.swiglu, (gate_up,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_swiglu_rounds_once(dtype: torch.dtype) -> None:
    gate_up, dy = torch.randn(50, 200).to(dtype).requires_grad_(), torch.randn(50, 100).to(dtype)
    y = reference.swiglu(gate_up)
    exact = gate_up.detach().double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    want = F.silu(gate) * up
    gradients = torch.autograd.grad(y, gate_up, dy) + torch.autograd.grad(want, exact, dy.double())
    for got, wanted in ((y, want), gradients):
        assert (got != wanted.to(dtype)).float().mean() < 1e-3


# Cross-entropy


def loss_inputs(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    targets = torch.randint(columns, (rows,))
    targets[1::3] = IGNORED
    return 3 * doubles(rows, columns, leaf=False), targets, torch.rand(rows, dtype=torch.float64)


def torch_s_losses(z: Tensor, targets: Tensor, smoothing: float = 0.0, z_loss: float = 0.0):
    losses = F.cross_entropy(
        z, targets, ignore_index=IGNORED, label_smoothing=smoothing, reduction="none"
    )
    return losses + z_loss * z.logsumexp(1).square().masked_fill(targets == IGNORED, 0)


@pytest.mark.parametrize("options", LOSS_OPTIONS)
def test_cross_entropy(options: tuple[float, float]) -> None:
    logits, targets, weight = loss_inputs(4, 9)
    exact, ours = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    want = torch_s_losses(exact, targets, *options)
    close(cross_entropy(ours, targets, IGNORED, *options), want)
    assert gradcheck(lambda z: cross_entropy(z, targets, IGNORED, *options), ours)
    # gradcheck scales the incoming gradient, which is 1 by contract in the other form.
    (want * weight).sum().backward()
    total, losses = cross_entropy_with_grad(ours * 1, targets, weight, None, IGNORED, *options)
    total.backward()
    close(losses, want.detach())
    close(total, (want * weight).sum())
    close(ours.grad, exact.grad)


def test_linear_cross_entropy() -> None:
    hidden, weight = doubles(9, 12), doubles(50, 12)
    _, targets, counts = loss_inputs(9, 50)
    want = torch_s_losses(hidden @ weight.t(), targets)
    wanted = torch.autograd.grad((want * counts).sum(), (hidden, weight))
    total, losses = linear_cross_entropy(hidden, weight, targets, counts, chunk_rows=4)
    close(losses, want.detach())
    for got, wanted_gradient in zip(
        torch.autograd.grad(total, (hidden, weight)), wanted, strict=True
    ):
        close(got, wanted_gradient)


# AdamW


def test_adamw() -> None:
    start, gradients = doubles(50, leaf=False), doubles(10, 50, leaf=False)
    parameter = torch.nn.Parameter(start.clone())
    theirs = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.1)
    moments = torch.zeros_like(start), torch.zeros_like(start)
    for count, gradient in enumerate(gradients, start=1):
        numbers = dict(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
        adamw_(start, gradient, *moments, torch.tensor(float(count)), **numbers)
        parameter.grad = gradient
        theirs.step()
    close(start, parameter.detach())
