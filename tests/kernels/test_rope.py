"""RoPE in Triton's interpreter, against its definition in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalite.config_model import ModelConfig
from megalite.layers.rope import rope_tables
from megalite_kernels import reference, rope, rope_packed, use_backend

LAYOUTS = ["half", "interleaved"]
DTYPES = {torch.float32: 1e-5, torch.float16: 2e-3}
# length, batch, query heads, key heads, head dim, rotated features
SHAPES = [
    (3, 2, 4, 2, 8, 8),
    (5, 1, 3, 1, 10, 6),
    (1, 3, 6, 6, 16, 2),
    (2, 2, 1, 1, 6, 6),
    (2, 1, 70, 3, 64, 64),
    (2, 1, 17, 17, 256, 192),
    (0, 2, 4, 2, 8, 8),
]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def tables(length: int, batch: int, rotated: int) -> tuple[Tensor, Tensor]:
    angles = 100 * torch.rand(length, batch, rotated // 2, dtype=torch.float64)
    return angles.cos().float(), angles.sin().float()


def relative(got: Tensor, exact: Tensor) -> float:
    if not exact.numel():
        return 0.0
    largest = exact.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return ((got.double() - exact).abs() / largest).max().item()


def turned_by_complex_numbers(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """The definition's definition: pairs as complex numbers times e^(i angle)."""
    half = cos.shape[-1]
    turning, rest = x[..., : 2 * half].double(), x[..., 2 * half :].double()
    pairs = turning.unflatten(-1, (2, half) if layout == "half" else (half, 2))
    pairs = pairs.transpose(-1, -2) if layout == "half" else pairs
    factor = torch.complex(cos.double(), sin.double())[:, :, None]
    turned = torch.complex(*pairs.unbind(-1)) * factor
    turned = torch.stack([turned.real, turned.imag], -1)
    turned = turned.transpose(-1, -2) if layout == "half" else turned
    return torch.cat([turned.flatten(-2), rest], -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rope(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    length, batch, heads, kv_heads, dim, rotated = shape
    leaves = [
        torch.randn(length, batch, n, dim).to(dtype).requires_grad_() for n in (heads, kv_heads)
    ]
    gradients = [torch.randn_like(x) for x in leaves]
    cos, sin = tables(length, batch if length % 2 else 1, rotated)
    with use_backend("triton"):
        results = rope(*leaves, cos, sin, layout)
        torch.autograd.backward(results, gradients)
    for x, y, dy in zip(leaves, results, gradients, strict=True):
        assert y.is_contiguous() and y.dtype == dtype and x.grad is not None
        assert relative(y, turned_by_complex_numbers(x, cos, sin, layout)) < DTYPES[dtype]
        back = turned_by_complex_numbers(dy, cos, -sin, layout)
        assert relative(x.grad, back) < DTYPES[dtype]


def views(kind: str) -> tuple[Tensor, Tensor]:
    """q [3, 2, 4, 8] and k [3, 2, 2, 8]."""
    if kind == "packed":
        q, k, _ = torch.randn(3, 2, 8, 8).split([4, 2, 2], dim=2)
        return q, k
    if kind == "batch first":
        return torch.randn(2, 3, 4, 8).transpose(0, 1), torch.randn(2, 3, 2, 8).transpose(0, 1)
    if kind == "heads first":
        return torch.randn(2, 4, 3, 8).permute(2, 0, 1, 3), torch.randn(2, 2, 3, 8).permute(
            2, 0, 1, 3
        )
    if kind == "features apart":
        return torch.randn(3, 2, 8, 4).transpose(2, 3), torch.randn(3, 2, 2, 16)[..., ::2]
    return torch.randn(3, 2, 4, 1).expand(-1, -1, -1, 8), torch.randn(8).expand(3, 2, 2, 8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "kind", ["packed", "batch first", "heads first", "features apart", "expanded"]
)
def test_views_and_gradients_of_any_strides(kind: str, layout: str) -> None:
    q, k = (x.requires_grad_() for x in map(torch.Tensor.detach, views(kind)))
    cos, sin = tables(3, 1, 6)
    wide = torch.cat([cos, sin], -1)
    cos, sin = wide[..., :3], wide[..., 3:]
    gradients = views(kind)
    with use_backend("triton"):
        results = rope(q, k, cos, sin, layout)
        got = torch.autograd.grad(results, (q, k), gradients)
    for x, y, dy, dx in zip((q, k), results, gradients, got, strict=True):
        assert relative(y, turned_by_complex_numbers(x, cos, sin, layout)) < 1e-5
        assert relative(dx, turned_by_complex_numbers(dy, cos, -sin, layout)) < 1e-5


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_after_a_projection(shape: tuple[int, ...], layout: str, inplace: bool) -> None:
    """The gradients of the projection that made the packed tensor, too."""
    length, batch, heads, kv_heads, dim, rotated = shape
    cos, sin = tables(length, batch if length % 2 else 1, rotated)
    sizes = (heads, kv_heads, kv_heads)
    x = torch.randn(length, batch, 5, requires_grad=True)
    weight = torch.randn(sum(sizes) * dim, 5, requires_grad=True)
    # As scaled_dot_product_attention gives them.
    gradients = [torch.randn(batch, n, length, dim).permute(2, 0, 1, 3) for n in sizes]

    qkv = x @ weight.t()
    before = qkv.detach().clone()
    with use_backend("triton"):
        results = rope_packed(qkv, cos, sin, heads, kv_heads, layout, inplace)
    if qkv.numel():
        assert (results[0].data_ptr() == qkv.data_ptr()) == inplace
    assert inplace or torch.equal(qkv, before)
    got = torch.autograd.grad(results, (x, weight), gradients)

    leaves = [t.detach().double().requires_grad_() for t in (x, weight)]
    exact = reference.rope_packed(leaves[0] @ leaves[1].t(), cos, sin, heads, kv_heads, layout)
    wanted = torch.autograd.grad(exact, leaves, [g.double() for g in gradients])
    for a, b in zip((*results, *got), (*exact, *wanted), strict=True):
        assert a.shape == b.shape and relative(a, b.detach()) < 2e-5


@pytest.mark.parametrize("missing", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_packed_without_some_gradients(missing: tuple[int, ...]) -> None:
    cos, sin = tables(3, 2, 6)
    qkv = torch.randn(3, 2, 8 * 6, requires_grad=True)
    used = [part for part in range(3) if part not in missing]
    got = []
    for name in ("triton", "torch"):
        with use_backend(name):
            results = rope_packed(qkv, cos, sin, 4, 2)
        weights = [torch.arange(results[part].numel()).view_as(results[part]) for part in used]
        loss = sum((results[part] * w).sum() for part, w in zip(used, weights, strict=True))
        got.append(torch.autograd.grad(loss, qkv)[0])
    torch.testing.assert_close(*got)


def test_a_packed_tensor_that_is_not_contiguous_is_not_written_to() -> None:
    cos, sin = tables(3, 2, 8)
    wide = torch.randn(3, 2, 100)
    before = wide.clone()
    qkv = wide[..., :64]
    with use_backend("triton"):
        results = rope_packed(qkv, cos, sin, 4, 2, "half", True)
    assert torch.equal(wide, before)
    for a, b in zip(results, reference.rope_packed(qkv, cos, sin, 4, 2), strict=True):
        torch.testing.assert_close(a, b)


def test_who_kept_the_packed_tensor_is_told() -> None:
    """Autograd refuses to use a tensor that was turned after it was saved."""
    cos, sin = tables(3, 2, 8)
    qkv = torch.randn(3, 2, 64, requires_grad=True).clone()
    kept = qkv.square()
    with use_backend("triton"):
        q, _, _ = rope_packed(qkv, cos, sin, 4, 2, "half", True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (kept.sum() + q.sum()).backward()


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_huge_and_tiny(size: float) -> None:
    q, k = size * torch.randn(3, 2, 4, 8), size * torch.randn(3, 2, 2, 8)
    cos, sin = tables(3, 1, 8)
    with use_backend("triton"):
        results = rope(q, k, cos, sin)
    for x, y in zip((q, k), results, strict=True):
        error = (y.double() - turned_by_complex_numbers(x, cos, sin, "half")).abs().max()
        assert error < 1e-6 * size * 10


@pytest.mark.parametrize("operation", ["rope", "rope_packed", "in place"])
def test_compiled_without_breaks(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALITE_KERNELS", "triton")
    cos, sin = tables(3, 1, 8)
    qkv = torch.randn(3, 2, 64, requires_grad=True)

    def run(qkv: Tensor) -> tuple[Tensor, ...]:
        if operation == "rope":
            q, k, v = qkv.unflatten(2, (8, 8)).split([4, 2, 2], dim=2)
            return *rope(q, k, cos, sin), v
        return rope_packed(2 * qkv, cos, sin, 4, 2, "half", operation == "in place")

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    with torch.profiler.profile() as profile:
        pairs = [
            (results, torch.autograd.grad(results[0].sum() + (results[1] * results[2]).sum(), qkv))
            for results in (run(qkv), compiled(qkv))
        ]
    for eager, traced in zip(*pairs, strict=True):
        for a, b in zip(eager, traced, strict=True):
            torch.testing.assert_close(a, b)
    name = "rope_turn" if operation == "rope" else "rope_turn_packed"
    assert f"megalite::{name}" in {event.key for event in profile.key_averages()}


# Tables


@pytest.mark.parametrize("scaling", ["none", "linear", "llama3", "yarn"])
def test_tables_that_start_later(scaling: str) -> None:
    model = ModelConfig(head_dim=16, rope_scaling=scaling, rope_original_seq_length=32)
    whole = rope_tables(model, 12, torch.float32)
    later = rope_tables(model, 5, torch.float32, first=7)
    for a, b in zip(whole, later, strict=True):
        assert torch.equal(a[7:], b)


def test_yarn_keeps_the_fast_and_divides_the_slow() -> None:
    model = ModelConfig(head_dim=128, rope_scaling="yarn", rope_scaling_factor=4.0)
    model_without = ModelConfig(head_dim=128)
    scaled, plain = (rope_tables(m, 2, torch.float64)[1][1] for m in (model, model_without))
    size = 0.1 * torch.tensor(4.0).log().item() + 1.0
    assert scaled[0] == pytest.approx(size * plain[0].item())
    assert scaled[-1] == pytest.approx(size * plain[-1].item() / 4, rel=1e-6)
