"""RoPE's kernel on the card: errors beside eager torch's in the same dtype, full sizes, strides."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megalite_kernels import reference, rope, rope_packed, use_backend

LAYOUTS = ["half", "interleaved"]
LOW = [torch.bfloat16, torch.float16]
# length, batch, query heads, key heads, head dim, rotated features
SHAPES = [
    (4096, 4, 32, 8, 128, 128),
    (2048, 2, 32, 32, 128, 128),
    (2048, 1, 24, 8, 128, 64),
    (2048, 2, 32, 8, 64, 64),
    (1024, 3, 20, 4, 96, 96),
    (1024, 2, 16, 2, 256, 256),
    (513, 3, 71, 1, 64, 64),
    (127, 1, 5, 1, 36, 20),
]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def tables(length: int, batch: int, rotated: int) -> tuple[Tensor, Tensor]:
    frequencies = 10000.0 ** -(torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    first = torch.randint(1000, (batch,), dtype=torch.float64)
    angles = (torch.arange(length)[:, None] + first)[..., None] * frequencies
    return angles.cos().float().cuda(), angles.sin().float().cuda()


def packed(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """qkv, and gradients of q, k and v as scaled_dot_product_attention gives them."""
    length, batch, heads, kv_heads, dim, _ = shape
    sizes = (heads, kv_heads, kv_heads)
    qkv = torch.randn(length, batch, sum(sizes) * dim, device="cuda").to(dtype)
    gradients = [torch.randn(batch, n, length, dim, device="cuda").to(dtype) for n in sizes]
    return qkv, [g.permute(2, 0, 1, 3) for g in gradients]


def eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """As transformers and GPT-J's code write it, with the tables in fp32."""
    half = cos.shape[-1]

    def partners(x: Tensor) -> Tensor:
        if layout == "half":
            return torch.cat([-x[..., half:], x[..., :half]], -1)
        return torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)

    def turned(x: Tensor) -> Tensor:
        if layout == "half":
            wide = [torch.cat([t, t], -1)[:, :, None] for t in (cos, sin)]
        else:
            wide = [t.repeat_interleave(2, -1)[:, :, None] for t in (cos, sin)]
        x, rest = x[..., : 2 * half], x[..., 2 * half :]
        return torch.cat([(x * wide[0] + partners(x) * wide[1]).to(x.dtype), rest], -1)

    return turned(q), turned(k)


def poison(x: Tensor) -> None:
    """Leave NaN where the allocator takes the next tensors of this size from."""
    for tensor in [torch.full_like(x, torch.nan) for _ in range(3)]:
        del tensor


def outcomes(
    turn: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], gradients: list[Tensor]
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    poison(inputs[0])
    results = turn(*leaves)
    poison(inputs[0])
    taken = torch.autograd.grad(results, leaves, gradients[: len(results)])
    return [*(y.detach() for y in results), *taken]


def assert_as_exact(got: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """Of the largest and of the root mean square error."""
    errors = [(x.double() - exact).abs() for x in (got, theirs)]
    for size in (torch.max, lambda e: e.square().mean().sqrt()):
        mine, other = (size(error).item() for error in errors)
        assert mine <= 1.1 * other, (mine, other)


def assert_close(got: Tensor, exact: Tensor) -> None:
    largest = exact.abs().amax(-1, keepdim=True)
    assert ((got.double() - exact).abs() / largest).max() < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*LOW, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    """q and k as views of the packed tensor."""
    length, batch, heads, kv_heads, dim, rotated = shape
    cos, sin = tables(length, batch if length % 2 else 1, rotated)
    qkv, gradients = packed(shape, dtype)
    sizes = [heads, kv_heads, kv_heads]
    q, k, _ = qkv.unflatten(2, (-1, dim)).split(sizes, dim=2)
    got = outcomes(lambda q, k: rope(q, k, cos, sin, layout), [q, k], gradients)
    exact = outcomes(
        lambda q, k: reference.rope(q, k, cos.double(), sin.double(), layout),
        [q.double(), k.double()],
        [g.double() for g in gradients],
    )
    if dtype == torch.float32:
        for a, b in zip(got, exact, strict=True):
            assert_close(a, b)
        return
    theirs = outcomes(lambda q, k: eager(q, k, cos, sin, layout), [q, k], gradients)
    for a, b, c in zip(got, theirs, exact, strict=True):
        assert_as_exact(a, b, c)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*LOW, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_is_rope_bit_by_bit(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, inplace: bool
) -> None:
    length, batch, heads, kv_heads, dim, rotated = shape
    cos, sin = tables(length, batch if length % 2 else 1, rotated)
    qkv, gradients = packed(shape, dtype)
    sizes = [heads, kv_heads, kv_heads]

    def apart(qkv: Tensor) -> tuple[Tensor, ...]:
        q, k, v = qkv.unflatten(2, (-1, dim)).split(sizes, dim=2)
        return *rope(q, k, cos, sin, layout), v

    def together(qkv: Tensor) -> tuple[Tensor, ...]:
        return rope_packed(1 * qkv, cos, sin, heads, kv_heads, layout, inplace)

    results = [outcomes(turn, [qkv], gradients) for turn in (apart, together, together)]
    for first, second in pairwise(results):
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)


def test_gradients_behind_scaled_dot_product_attention() -> None:
    """A projection, packed RoPE in place and attention, beside plain torch in fp64."""
    cos, sin = tables(256, 2, 64)
    x = torch.randn(256, 2, 128, device="cuda", dtype=torch.bfloat16)
    weight = (torch.randn(8 * 64, 128, device="cuda") / 11).to(torch.bfloat16)

    def run(x: Tensor, weight: Tensor, back_end: str) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        with use_backend(back_end):
            q, k, v = rope_packed(leaves[0] @ leaves[1].t(), cos, sin, 4, 2, "half", True)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        y = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        seed = torch.arange(y.numel(), device="cuda").view_as(y).cos()
        return [y.detach(), *torch.autograd.grad(y, leaves, seed.to(y.dtype))]

    exact = run(x.double(), weight.double(), "torch")
    for mine, theirs, right in zip(
        run(x, weight, "triton"), run(x, weight, "torch"), exact, strict=True
    ):
        errors = [(t.double() - right).square().mean().sqrt().item() for t in (mine, theirs)]
        assert errors[0] <= 1.1 * errors[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_elements_than_32_bits_count(layout: str) -> None:
    length, batch, heads, kv_heads, dim = 4096, 110, 32, 8, 128
    cos, sin = tables(length, 1, dim)
    qkv = torch.randn(length, batch, (heads + 2 * kv_heads) * dim, device="cuda", dtype=LOW[0])
    assert qkv.numel() > 1 << 31
    ends = [qkv[place].clone() for place in (slice(0, 2), slice(-2, None))]
    expected = [
        torch.cat([t.flatten(2) for t in eager(*queries_and_keys(end), cos_, sin_, layout)], 2)
        for end, cos_, sin_ in zip(ends, (cos[:2], cos[-2:]), (sin[:2], sin[-2:]), strict=True)
    ]
    made = rope_packed(qkv, cos, sin, heads, kv_heads, layout)
    turned = rope_packed(qkv, cos, sin, heads, kv_heads, layout, True)
    for results in (made, turned):
        for place, wanted in zip((slice(0, 2), slice(-2, None)), expected, strict=True):
            got = torch.cat([t[place].flatten(2) for t in results[:2]], 2)
            torch.testing.assert_close(got, wanted, rtol=2e-2, atol=1e-2)
    for a, b in zip(made, turned, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_of_more_elements_than_32_bits_count(layout: str) -> None:
    length, batch, heads, kv_heads, dim = 4096, 160, 32, 1, 128
    cos, sin = tables(length, 1, dim)
    q, k = (
        torch.randn(length, batch, n, dim, device="cuda", dtype=LOW[0], requires_grad=True)
        for n in (heads, kv_heads)
    )
    assert q.numel() > 1 << 31
    gradients = torch.autograd.grad(rope(q, k, cos, sin, layout), (q, k), (q.detach(), k.detach()))
    for place in (slice(0, 2), slice(-2, None)):
        ends = [t[place].detach().clone().requires_grad_() for t in (q, k)]
        wanted = torch.autograd.grad(
            rope(*ends, cos[place], sin[place], layout), ends, [t.detach() for t in ends]
        )
        for got, want in zip(gradients, wanted, strict=True):
            assert torch.equal(got[place], want)


def queries_and_keys(qkv: Tensor) -> tuple[Tensor, Tensor]:
    q, k, _ = qkv.unflatten(2, (48, 128)).split([32, 8, 8], dim=2)
    return q, k


@pytest.mark.parametrize("operation", ["rope", "packed", "in place"])
def test_compiled_without_breaks(operation: str) -> None:
    shape = (512, 2, 8, 2, 64, 64)
    cos, sin = tables(512, 1, 64)
    qkv, gradients = packed(shape, torch.bfloat16)

    def run(qkv: Tensor) -> tuple[Tensor, ...]:
        if operation == "rope":
            q, k, v = qkv.unflatten(2, (-1, 64)).split([8, 2, 2], dim=2)
            return *rope(q, k, cos, sin), v.contiguous()
        return rope_packed(2 * qkv, cos, sin, 8, 2, "half", operation == "in place")

    compiled = torch.compile(run, fullgraph=True)
    for a, b in zip(*(outcomes(f, [qkv], gradients) for f in (run, compiled)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("inplace", [False, True])
def test_captured_in_a_graph(inplace: bool) -> None:
    cos, sin = tables(512, 1, 64)
    qkv, _ = packed((512, 2, 8, 2, 64, 64), torch.bfloat16)
    before = qkv.clone()
    wanted = rope_packed(qkv, cos, sin, 8, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = rope_packed(qkv, cos, sin, 8, 2, "half", inplace)
    qkv.copy_(before)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)
