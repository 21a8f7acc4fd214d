"""RoPE of queries and keys in one launch; in the packed projection too, where they lie."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megalite_kernels.fused.launch import on_device, operator
from megalite_kernels.fused.rope_kernels import turn_kernel


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, layout: str = "half"
) -> tuple[Tensor, Tensor]:
    """Queries and keys, their pairs of features turned by the angle of position and frequency.

    (a, b) -> (a cos - b sin, b cos + a sin); the backward is the same kernel with -sin. A pair is
    (x_i, x_{i + R/2}) in the half layout, (x_{2i}, x_{2i+1}) in the interleaved one; the features
    from R on stay as they are. Computed in fp32, rounded once; the tables are never rounded.

    Bytes moved per element of q and k, 2-byte dtype: 4, forward and backward; and the tables once.

    Args:
        q: [S, B, N, D]; fp32, fp16 or bf16. Views of a packed tensor are read in place; only
            features that aren't adjacent are copied.
        k: [S, B, K, D], likewise.
        cos, sin: [S, 1 or B, R/2], fp32, R <= D.
        layout: "half" (GPT-NeoX, LLaMA) or "interleaved" (GPT-J).

    Returns:
        Contiguous, shapes and dtypes of `q` and `k`.

    Source: Su et al., "RoFormer", arXiv:2104.09864. One program for all heads of a token as in
    Liger-Kernel; splitting an interleaved block in registers was learned from Helion's examples.
    """
    result: tuple[Tensor, Tensor] = _Rope.apply(q, k, cos, sin, layout)
    return result


def rope_packed(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    layout: str = "half",
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rope` on the packed projection of queries, keys and values.

    The backward turns the three gradients, of any strides, into one packed gradient: no
    concatenation before the projection's backward.

    Bytes moved per element, 2-byte dtype: in place 4 for q and k and none for v; else, and in the
    backward, 4 for all.

    Args:
        qkv: [S, B, (N + 2 K) D], queries first, then keys, then values.
        cos, sin, layout: as in `rope`.
        num_heads, num_kv_heads: N and K.
        inplace: turn the heads where they lie; `qkv` must not be needed again, and is not a leaf.
            Under a compiler, and if `qkv` is not contiguous, a new tensor is made all the same.

    Returns:
        q [S, B, N, D], k and v [S, B, K, D], views of one packed tensor.
    """
    result: tuple[Tensor, Tensor, Tensor] = _RopePacked.apply(
        qkv, cos, sin, num_heads, num_kv_heads, layout, inplace
    )
    return result


class _Rope(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, layout: str
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.layout = layout
        return rope_turn(q, k, cos, sin, layout == "interleaved", False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dq, dk = rope_turn(dq, dk, cos, sin, ctx.layout == "interleaved", True)
        return dq, dk, None, None, None


class _RopePacked(Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        num_heads: int,
        num_kv_heads: int,
        layout: str,
        inplace: bool,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.heads = layout, (num_heads, num_kv_heads)
        heads = (num_heads, num_kv_heads, num_kv_heads)
        if inplace and not torch.compiler.is_compiling() and qkv.is_contiguous():
            # Detached: autograd takes q, k and v for new tensors, not for views of the input, whose
            # gradients it would put together itself. Who kept the input for backward is told.
            q, k, v = _heads(qkv.detach(), heads)
            _launch(q, k, None, q, k, None, cos, sin, layout == "interleaved", False)
            torch.autograd.graph.increment_version(qkv)
            return q, k, v
        q, k, v = _heads(qkv, heads)
        options = (layout == "interleaved", False, num_heads, num_kv_heads)
        return _heads(rope_turn_packed(q, k, v, cos, sin, *options), heads)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if dq is None and dk is None and dv is None:
            return (None,) * 7
        cos, sin = ctx.saved_tensors
        options = (ctx.layout == "interleaved", True, *ctx.heads)
        return rope_turn_packed(dq, dk, dv, cos, sin, *options), None, None, None, None, None, None


def _heads(packed: Tensor, heads: tuple[int, ...]) -> tuple[Tensor, ...]:
    length, batch, width = packed.shape
    count = sum(heads)
    return packed.view(length, batch, count, width // count).split_with_sizes(heads, dim=2)


def _turned_like(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backwards: bool
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@operator(fake=_turned_like)
def rope_turn(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backwards: bool
) -> tuple[Tensor, Tensor]:
    """[S, B, N, D] and [S, B, K, D] of any strides to new contiguous ones."""
    new_q, new_k = q.new_empty(q.shape), k.new_empty(k.shape)
    _launch(q, k, None, new_q, new_k, None, cos, sin, interleaved, backwards)
    return new_q, new_k


def _packed_like(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    backwards: bool,
    num_heads: int,
    num_kv_heads: int,
) -> Tensor:
    given = next(x for x in (q, k, v) if x is not None)
    length, batch, _, dim = given.shape
    return given.new_empty(length, batch, (num_heads + 2 * num_kv_heads) * dim)


@operator(fake=_packed_like)
def rope_turn_packed(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    backwards: bool,
    num_heads: int,
    num_kv_heads: int,
) -> Tensor:
    """[S, B, N, D] and twice [S, B, K, D] of any strides to a new [S, B, (N + 2 K) D].

    What is None counts as zeros, but not all of them.
    """
    packed = _packed_like(q, k, v, cos, sin, interleaved, backwards, num_heads, num_kv_heads)
    new_q, new_k, new_v = _heads(packed, (num_heads, num_kv_heads, num_kv_heads))
    _launch(q, k, v, new_q, new_k, new_v, cos, sin, interleaved, backwards)
    return packed


class _Launch(NamedTuple):
    """Most heads of a program's blocks, and its warps, for heads of up to `dim` features."""

    dim: float
    heads: int
    warps: int


# Measured on an H200 with 32 query and 8 key heads, 16 and 4 of D 256; D 64, 96, 128, 256.
_HALF = (_Launch(96, 32, 4), _Launch(128, 32, 8), _Launch(float("inf"), 16, 8))
_INTERLEAVED = (_Launch(128, 32, 4), _Launch(float("inf"), 16, 4))


def _launch(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    new_q: Tensor,
    new_k: Tensor,
    new_v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    backwards: bool,
) -> None:
    """Turn q and k, copy v, where `new_v` is given. Results: [S, B, heads, D], where the tokens lie
    evenly apart and the rest is contiguous."""
    length, batch, num_heads, dim = new_q.shape
    num_kv_heads = new_k.shape[2]
    if not new_q.numel() + new_k.numel():
        return
    q, k, v = (
        x if x is None or x.stride(3) == 1 or dim == 1 else x.contiguous() for x in (q, k, v)
    )
    half = cos.shape[2]
    if cos.stride() != sin.stride() or cos.stride(2) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    blocks, constants = _plan(num_heads, num_kv_heads, dim, half, interleaved)
    with on_device(new_q):
        turn_kernel[(length * batch, blocks)](
            q,
            k,
            v,
            new_q,
            new_k,
            new_v,
            cos,
            sin,
            *_strides(q),
            *_strides(k),
            *_strides(v),
            _token_stride(new_q),
            _token_stride(new_k),
            cos.stride(0),
            cos.stride(1) if cos.shape[1] > 1 else 0,
            batch,
            REST=0 if q is new_q else dim - 2 * half,
            BACKWARDS=backwards,
            **constants,
        )


@functools.cache
def _plan(
    num_heads: int, num_kv_heads: int, dim: int, half: int, interleaved: bool
) -> tuple[int, Mapping[str, int]]:
    """Programs for a token, and the kernel's constants."""
    table = _INTERLEAVED if interleaved else _HALF
    chosen = next(launch for launch in table if dim <= launch.dim)
    block = min(triton.next_power_of_2(num_heads), chosen.heads)
    kv_block = min(triton.next_power_of_2(num_kv_heads), chosen.heads)
    blocks = max(triton.cdiv(num_heads, block), triton.cdiv(num_kv_heads, kv_block))
    constants = dict(
        Q_HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        DIM=dim,
        HALF=half,
        HALF_PADDED=triton.next_power_of_2(half),
        REST_PADDED=triton.next_power_of_2(dim - 2 * half),
        DIM_PADDED=triton.next_power_of_2(dim),
        INTERLEAVED=interleaved,
        Q_BLOCK=block,
        KV_BLOCK=kv_block,
        num_warps=chosen.warps,
    )
    return blocks, MappingProxyType(constants)


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()[:3]


def _token_stride(x: Tensor) -> int:
    return x.stride(1) if x.shape[1] > 1 else x.stride(0)
