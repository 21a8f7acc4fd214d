"""Scaled softmax of attention scores, with a mask, causal, or both, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megalite_kernels.fused.launch import on_device, operator
from megalite_kernels.fused.softmax_held import Held, MaskView, held_backward, held_forward
from megalite_kernels.fused.softmax_walk import Walk, walk_backward, walk_forward

Plan = Held | Walk
Table = tuple[tuple[int, Plan], ...]
"""(keys up to which the plan serves, plan), ascending; the last serves all longer rows."""

ANY = 1 << 62
# Measured on an H200 in bf16; MASKED's last plan is taken from PLAIN. A held row is read once, but
# its registers leave few programs to a multiprocessor for some to load while others compute, so
# longer rows are walked. That comes late under a mask, which walking reads twice, and pays least
# just above 4096 plain keys, of which no block is a good divisor. Where rows are multiples of 16
# bytes the caps on registers make no kernel spill, fp32 rows included, but a little in the last of
# CAUSAL with a mask. Odd lengths, whose loads are as narrow as an element, do spill.
PLAIN: Table = (
    (1024, Held(2)),
    (2048, Walk(2048, 2, 64)),
    (4096, Walk(4096, 4, 64)),
    (6144, Held(8)),
    (8192, Walk(4096, 4, 96)),
    (16384, Walk(8192, 8, 96)),
    (24576, Walk(8192, 8, 64)),
    (ANY, Walk(8192, 16, 96)),
)
MASKED: Table = (
    (1024, Held(1)),
    (2048, Held(2)),
    (4096, Held(4)),
    (8192, Held(8)),
    (16384, Held(16)),
    (24576, Walk(8192, 8, 64)),
    (ANY, Walk(8192, 16, 96)),
)
CAUSAL: Table = (
    (1024, Held(1)),
    (2048, Held(2)),
    (4096, Held(4)),
    (8192, Walk(2048, 4, 64)),
    (24576, Walk(4096, 8, 64)),
    (ANY, Walk(8192, 8, 64)),
)
PLAIN_BACKWARD: Table = (
    (512, Held(4)),
    (1024, Walk(1024, 2, 64)),
    (2048, Walk(2048, 4, 64)),
    (4096, Walk(4096, 8, 80)),
    (6144, Walk(2048, 4, 64)),
    (24576, Walk(8192, 8, 80)),
    (ANY, Walk(8192, 16, 80)),
)
CAUSAL_BACKWARD: Table = (
    (1024, Held(1)),
    (2048, Walk(1024, 2, 64)),
    (6144, Walk(2048, 4, 64)),
    (8192, Walk(2048, 4, 80)),
    (16384, Walk(4096, 8, 64)),
    (24576, Walk(4096, 8, 80)),
    (ANY, Walk(8192, 16, 64)),
)


def softmax(
    x: Tensor, scale: float = 1.0, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """y_j = exp(s_j - max s) / sum_k exp(s_k - max s) of the last dim, s = scale * x + mask.

    Backward: dx = scale * y * (dy - sum(dy * y)), from the saved output. A row without a key, all
    of whose scores are -inf (by masks or by themselves), gives zeros and has a gradient of zero.

    Args:
        x: [..., Sq, Sk], fp32, fp16 or bf16, any number of rows of any length; computed in fp32 and
            rounded once. Copied first unless its keys lie side by side and its rows evenly spaced.
        scale: above 0.
        mask: [b or 1, h or 1, Sq or 1, Sk or 1] or what else broadcasts; bool: True hides a key, as
            in Megatron; floating of any precision: added to scale * x. Read where it lies, without
            being expanded (beyond three leading dims that can't be merged it is). No gradient.
        causal: query i sees key j only if j <= i + Sk - Sq. Hidden keys are not read.

    Returns:
        Contiguous, shape and dtype of `x`.

    Bytes per bf16 score at least: 4 forward, 6 backward; causal 3 and 4, as half is not read; and
    of a mask its own, once if the L2 cache holds it for the heads that share it.

    Source: the semantics are those of Megatron-LM's fused softmaxes (Shoeybi et al.,
    arXiv:1909.08053); the statistics of walked rows are from Milakov and Gimelshein, "Online
    normalizer calculation for softmax", arXiv:1805.02867.
    """
    return _Softmax.apply(x, scale, mask, causal)


class _Softmax(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, mask: Tensor | None, causal: bool) -> Tensor:
        y = _softmax_forward(x, mask, scale, causal)
        ctx.save_for_backward(y)
        ctx.scale, ctx.causal = scale, causal
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (y,) = ctx.saved_tensors
        return _softmax_backward(dy, y, ctx.scale, ctx.causal), None, None, None


def _fake_forward(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(dy: Tensor, y: Tensor, scale: float, causal: bool) -> Tensor:
    return y.new_empty(y.shape)


@operator(fake=_fake_forward)
def _softmax_forward(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    table = CAUSAL if causal else PLAIN if mask is None else MASKED
    return run_forward(x, mask, scale, causal, _plan(table, x.shape[-1]))


@operator(fake=_fake_backward)
def _softmax_backward(dy: Tensor, y: Tensor, scale: float, causal: bool) -> Tensor:
    table = CAUSAL_BACKWARD if causal else PLAIN_BACKWARD
    return run_backward(dy, y, scale, causal, _plan(table, y.shape[-1]))


def run_forward(x: Tensor, mask: Tensor | None, scale: float, causal: bool, plan: Plan) -> Tensor:
    """The softmax by a given plan."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return y
    rows = _rows(x)
    view = MaskView() if mask is None else view_mask(mask, x.shape)
    queries = x.shape[-2] if causal else rows.shape[0]
    with on_device(x):
        if isinstance(plan, Held):
            held_forward(rows, view, y, scale, causal, queries, plan)
        else:
            walk_forward(rows, view, y, scale, causal, queries, plan)
    return y


def run_backward(dy: Tensor, y: Tensor, scale: float, causal: bool, plan: Plan) -> Tensor:
    """The gradient by a given plan."""
    dx = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if not y.numel():
        return dx
    dy, rows = _rows(dy), _rows(y)
    queries = y.shape[-2] if causal else rows.shape[0]
    with on_device(y):
        if isinstance(plan, Held):
            held_backward(dy, rows, dx, scale, causal, queries, plan)
        else:
            walk_backward(dy, rows, dx, scale, causal, queries, plan)
    return dx


def view_mask(mask: Tensor, shape: torch.Size) -> MaskView:
    """The mask as the kernels read it beside scores of this shape."""
    kind = "bool" if mask.dtype == torch.bool else "added"
    wide = mask.expand(shape)
    if wide.stride(-1) > 1:
        wide = mask.contiguous().expand(shape)
    dims = _merged(wide)
    if len(dims) > 3:
        wide = wide.contiguous()
        dims = _merged(wide)
    (_, stride0), (size1, stride1), (size2, stride2) = [(1, 0)] * (3 - len(dims)) + dims
    return MaskView(wide, kind, size1, size2, stride0, stride1, stride2, min(1, wide.stride(-1)))


def _merged(wide: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the dims before the last, neighbours merged where one stride serves."""
    dims: list[tuple[int, int]] = []
    for size, stride in zip(wide.shape[:-1], wide.stride()[:-1], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    return dims


def _rows(x: Tensor) -> Tensor:
    """[rows, keys] with keys side by side; a copy only if that can't be had as a view."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _plan(table: Table, keys: int) -> Plan:
    return next(plan for most, plan in table if keys <= most)
