"""RMSNorm and residual add + RMSNorm: plans of launches, launching functions, autograd.

Learned from: Liger-Kernel's Triton RMSNorm (one dW row per program, casting modes), QuACK (threads
per row by width, the next row's loads ahead of this row's arithmetic), Fast-LLM (a partial buffer
whose size does not follow the row count), Inductor's mix-order reduction (dx and dW in one pass).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megalite_kernels.fused.column_sum import can_start_early, column_sum
from megalite_kernels.fused.launch import num_multiprocessors, on_device, operator
from megalite_kernels.fused.rms_norm_kernels import backward_kernel, forward_kernel


class Forward(NamedTuple):
    """How the forward is launched.

    Attributes:
        rows: of a program.
        warps: of a program.
    """

    rows: int
    warps: int


class Backward(NamedTuple):
    """How the backward is launched.

    Attributes:
        rows: of a tile.
        warps: of a program.
        walkers: programs per multiprocessor, each of which walks over tiles.
        reads: "staged", "ahead" or "twice", see `backward_kernel`.
        keeps_weight: hold the weight in registers in place of reading it for every tile.
    """

    rows: int
    warps: int
    walkers: int
    reads: str = "ahead"
    keeps_weight: bool = True


# Measured on an H200 in bf16, at 8192 and 32768 rows of 1024 to 16384; narrower ones go on in line.
FORWARD = (
    (256, Forward(rows=16, warps=4), None),
    (512, Forward(rows=8, warps=4), None),
    (1024, Forward(rows=4, warps=4), None),
    (2048, Forward(rows=2, warps=2), None),
    (4096, Forward(rows=1, warps=4), None),
    (8192, Forward(rows=1, warps=8), Forward(rows=1, warps=4)),
    (16384, Forward(rows=1, warps=16), None),
    (32768, Forward(rows=1, warps=16), Forward(rows=1, warps=32)),
)
FORWARD_WIDER = Forward(rows=1, warps=32)
"""(bytes of a row padded to a power of two, plan of rows up to them, plan with a residual if its
own is more than 1% faster)."""

BACKWARD = (
    (256, Backward(rows=16, warps=4, walkers=4), None),
    (512, Backward(rows=8, warps=4, walkers=4), None),
    (1024, Backward(rows=4, warps=4, walkers=4), None),
    (2048, Backward(rows=2, warps=4, walkers=4), None),
    (
        4096,
        Backward(rows=1, warps=4, walkers=4, reads="staged"),
        Backward(rows=1, warps=4, walkers=3, reads="staged"),
    ),
    (
        8192,
        Backward(rows=1, warps=16, walkers=2, reads="staged"),
        Backward(rows=2, warps=16, walkers=1),
    ),
    (
        16384,
        Backward(rows=1, warps=8, walkers=1, reads="staged"),
        Backward(rows=1, warps=16, walkers=1),
    ),
    (
        32768,
        Backward(rows=1, warps=16, walkers=1, reads="staged", keeps_weight=False),
        Backward(rows=1, warps=32, walkers=1, reads="twice"),
    ),
)
BACKWARD_WIDER = Backward(rows=1, warps=32, walkers=1, reads="twice", keeps_weight=False)


def rms_norm(x: Tensor, weight: Tensor, eps: float, casting: str = "fp32") -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim.

    Backward, with xhat = x * rstd and g = dy * weight:
    dx = (g - xhat * mean(g * xhat)) * rstd and dweight = sum over rows of dy * xhat.

    Args:
        x: [..., H], fp32, fp16 or bf16, any strides (rows that are not dense are copied first).
        weight: [H], of any of these dtypes.
        eps: added to the mean square.
        casting: "fp32": all in fp32, rounded once at the end. "llama": the normalised x is rounded
            to x's dtype before the weight multiplies it. "gemma": fp32 with the scale 1 + weight.
            The gradients are computed in fp32 in each, and rounded once.

    Returns:
        Shape and dtype of `x`, contiguous.

    Bytes per element of bf16: forward 4 (x, y), backward 6 (dy, x, dx); per row 4 for rstd each
    way; per program of the backward 8 * H for the partial sums of dweight. Saved: x, weight, rstd.

    Source: Zhang and Sennrich, "Root mean square layer normalization", arXiv:1910.07467.
    """
    return _RMSNorm.apply(x, weight, eps, casting)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, casting: str = "fp32"
) -> tuple[Tensor, Tensor]:
    """(rms_norm(new_residual), new_residual), where new_residual = x + residual.

    The sum is taken in fp32 and rounded to the residual's dtype; the norm is of the rounded sum.
    Backward, in one pass: the gradient of both inputs is that of `rms_norm` plus that of
    new_residual.

    Args:
        x: [..., H], fp32, fp16 or bf16, any strides.
        residual: shape of `x`, of any of these dtypes.
        weight, eps, casting: as in `rms_norm`.

    Returns:
        normed: shape of `x`, of x's dtype.
        new_residual: shape of `x`, of the residual's dtype.

    Bytes per element of bf16: forward 8, backward 8 (dnormed, dnew_residual, new_residual, dx);
    with an fp32 residual 12, and 16 because each input's gradient has its own dtype. Saved:
    new_residual, weight, rstd.
    """
    return _AddRMSNorm.apply(x, residual, weight, eps, casting)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, casting: str) -> Tensor:
        y, rstd = rms_norm_forward(x, weight, eps, casting)
        ctx.save_for_backward(x, weight, rstd)
        ctx.casting = casting
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = rms_norm_backward(dy, None, x, weight, rstd, ctx.casting)
        return dx, dweight, None, None


class _AddRMSNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, casting: str
    ) -> tuple[Tensor, Tensor]:
        y, new_residual, rstd = add_rms_norm_forward(x, residual, weight, eps, casting)
        ctx.save_for_backward(new_residual, weight, rstd)
        ctx.casting, ctx.dtype = casting, x.dtype
        ctx.set_materialize_grads(False)
        return y, new_residual

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor | None, dresidual: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        new_residual, weight, rstd = ctx.saved_tensors
        if dy is None:
            return _as(dresidual, ctx.dtype), dresidual, None, None, None
        saved = (new_residual, weight, rstd, ctx.casting)
        if ctx.dtype == new_residual.dtype:
            dx, dweight = rms_norm_backward(dy, dresidual, *saved)
            return dx, dx, dweight, None, None
        dx, of_residual, dweight = mixed_add_rms_norm_backward(dy, dresidual, *saved)
        return dx, of_residual, dweight, None, None


def _fake_forward(x: Tensor, weight: Tensor, eps: float, casting: str) -> tuple[Tensor, Tensor]:
    return _like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


@operator(fake=_fake_forward)
def rms_norm_forward(x: Tensor, weight: Tensor, eps: float, casting: str) -> tuple[Tensor, Tensor]:
    """(y, rstd) of `rms_norm`."""
    y, rstd = _fake_forward(x, weight, eps, casting)
    launch_forward(x, None, weight, y, None, rstd, eps, casting)
    return y, rstd


def _fake_add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, casting: str
) -> tuple[Tensor, Tensor, Tensor]:
    y, rstd = _fake_forward(x, weight, eps, casting)
    return y, _like(residual), rstd


@operator(fake=_fake_add_forward)
def add_rms_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, casting: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, new residual, rstd) of `add_rms_norm`."""
    y, new_residual, rstd = _fake_add_forward(x, residual, weight, eps, casting)
    launch_forward(x, residual, weight, y, new_residual, rstd, eps, casting)
    return y, new_residual, rstd


def _fake_backward(
    dy: Tensor, dresidual: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, casting: str
) -> tuple[Tensor, Tensor]:
    return _like(x), weight.new_empty(weight.shape)


@operator(fake=_fake_backward)
def rms_norm_backward(
    dy: Tensor, dresidual: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, casting: str
) -> tuple[Tensor, Tensor]:
    """(dx, dweight) from the gradients of both results; `x` is what was normalised."""
    dx = _like(x)
    return dx, launch_backward(dy, dresidual, x, weight, rstd, dx, None, casting)


def _fake_mixed_backward(
    dy: Tensor, dresidual: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, casting: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x, dy.dtype), _like(x), weight.new_empty(weight.shape)


@operator(fake=_fake_mixed_backward)
def mixed_add_rms_norm_backward(
    dy: Tensor, dresidual: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, casting: str
) -> tuple[Tensor, Tensor, Tensor]:
    """As `rms_norm_backward`, with the gradient first in dy's dtype, then in x's."""
    dx, of_residual = _like(x, dy.dtype), _like(x)
    dweight = launch_backward(dy, dresidual, x, weight, rstd, of_residual, dx, casting)
    return dx, of_residual, dweight


def launch_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    y: Tensor,
    new_residual: Tensor | None,
    rstd: Tensor,
    eps: float,
    casting: str,
    plan: Forward | None = None,
) -> None:
    """Fill y, rstd and, given a residual, new_residual."""
    width, rows = x.shape[-1], rstd.numel()
    if rows == 0:
        return
    block = triton.next_power_of_2(width)
    plan = plan or _plan(FORWARD, block, x, residual, residual, FORWARD_WIDER)
    x, x_stride = _as_rows(x)
    residual, residual_stride = (None, 0) if residual is None else _as_rows(residual)
    with on_device(x):
        forward_kernel[(triton.cdiv(rows, plan.rows),)](
            x,
            residual,
            weight if weight.is_contiguous() else weight.contiguous(),
            y,
            new_residual,
            rstd,
            x_stride,
            residual_stride,
            rows,
            eps,
            width=width,
            BLOCK=block,
            ROWS=plan.rows,
            CASTING=casting,
            num_warps=plan.warps,
        )


def launch_backward(
    dy: Tensor,
    dresidual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    dx: Tensor,
    dx_too: Tensor | None,
    casting: str,
    plan: Backward | None = None,
) -> Tensor:
    """Fill dx and, if given, dx_too with the same gradient; returns dweight."""
    width, rows = x.shape[-1], rstd.numel()
    if rows == 0:
        return weight.new_zeros(weight.shape)
    block = triton.next_power_of_2(width)
    if plan is None:
        plan = _plan(BACKWARD, block, x, dy, dresidual, BACKWARD_WIDER)
        widest = max(x.element_size(), dy.element_size())
        if not plan.keeps_weight and weight.element_size() > widest:
            # It would be staged like the rows, and there is room for one of their width only.
            plan = BACKWARD_WIDER
    early = can_start_early(x)
    dy, dy_stride = _as_rows(dy)
    dresidual, dresidual_stride = (None, 0) if dresidual is None else _as_rows(dresidual)
    x, x_stride = _as_rows(x)
    programs = min(triton.cdiv(rows, plan.rows), plan.walkers * num_multiprocessors(x))
    partials = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    with on_device(x):
        backward_kernel[(programs,)](
            dy,
            dresidual,
            x,
            weight if weight.is_contiguous() else weight.contiguous(),
            rstd,
            dx,
            dx_too,
            partials,
            dy_stride,
            dresidual_stride,
            x_stride,
            rows,
            width=width,
            BLOCK=block,
            ROWS=plan.rows,
            READS=plan.reads,
            KEEPS_WEIGHT=plan.keeps_weight,
            EARLY=early,
            CASTING=casting,
            num_warps=plan.warps,
        )
    return column_sum(partials, weight.dtype, early=early)


def _plan(
    table: tuple[tuple[int, Any, Any], ...],
    block: int,
    x: Tensor,
    other: Tensor | None,
    residual: Tensor | None,
    wider: Any,
) -> Any:
    """By the widest dtype that is read: registers and shared memory have to hold its rows."""
    row_bytes = block * x.element_size()
    if other is not None and other.dtype != x.dtype:
        row_bytes = block * max(x.element_size(), other.element_size())
    for most, plan, with_residual in table:
        if row_bytes <= most:
            return plan if residual is None or with_residual is None else with_residual
    return wider


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Empty and contiguous, whatever the strides of x."""
    return x.new_empty(x.shape, dtype=dtype or x.dtype)


def _as(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return x if x is None else x.to(dtype)


def _as_rows(x: Tensor) -> tuple[Tensor, int]:
    """x with dense rows at one distance from each other, in elements; a copy where it has none."""
    if x.is_contiguous():
        return x, x.shape[-1]
    flat = x.reshape(-1, x.shape[-1])
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    return flat, flat.stride(0)
