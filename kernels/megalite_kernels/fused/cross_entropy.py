"""Cross-entropy over whole rows of logits, as two passes or with its gradient in one.

Sources: Liger-Kernel (loss and gradient in one kernel, over the logits), QuACK (a row kept on chip
between its two uses), NVIDIA Transformer Engine (online statistics).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megalite_kernels.fused.cross_entropy_kernels import (
    choose_pass,
    choose_tile,
    gradient_kernel,
    loss_kernel,
)
from megalite_kernels.fused.cross_entropy_rows import (
    choose_walk,
    held_rows_kernel,
    walked_rows_kernel,
)
from megalite_kernels.fused.launch import num_multiprocessors, on_device, operator
from megalite_kernels.reference_cross_entropy import weighted


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """`reference_cross_entropy.cross_entropy`: algebra, arguments and result.

    [..., V] in fp32, fp16 or bf16 -> fp32 [...]; computed in fp32, the gradient rounded once.
    Keeps the logits and lse in fp64 (8 B/token). Floor: 2 B/logit forward, 4 B/logit backward in
    bf16; each logit is read once and each gradient written once.
    """
    columns = logits.shape[-1]
    options = (ignore_index, float(label_smoothing), float(z_loss))
    losses = _CrossEntropy.apply(logits.reshape(-1, columns), targets.reshape(-1), *options)
    return losses.view(targets.shape)


def cross_entropy_with_grad(
    logits: Tensor,
    targets: Tensor,
    token_weight: Tensor,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`reference_cross_entropy.cross_entropy_with_grad`: algebra, arguments, results, CONTRACT.

    THE LOGITS' MEMORY IS OVERWRITTEN with the final gradient if one is needed, and the gradient
    that comes into the total must be 1. Under torch.compile the gradient is a new tensor instead.

    [..., W] in fp32, fp16 or bf16 -> fp32; computed in fp32, the gradient rounded once. Floor:
    4 B/logit in bf16 for forward and backward, the second use of a logit being served by registers
    or the L2 cache; memory beyond the logits: 8 B/token.
    """
    columns = logits.shape[-1]
    options = (vocab_size or columns, ignore_index, float(label_smoothing), float(z_loss))
    if torch.is_grad_enabled() and logits.requires_grad:
        return _WithGrad.apply(logits, targets, token_weight, *options)
    losses = token_losses(logits.detach().reshape(-1, columns), targets.reshape(-1), *options)
    total = weighted(losses, token_weight.reshape(-1)).sum()
    return total, losses.view(targets.shape)


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, *options: Any) -> Tensor:
        losses, log_sum = losses_and_log_sums(logits, targets, logits.shape[1], *options)
        ctx.save_for_backward(logits, targets, log_sum)
        ctx.options = options
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, log_sum = ctx.saved_tensors
        gradient = gradient_of_losses(logits, targets, log_sum, dloss, *ctx.options)
        return gradient, None, None, None, None


class _WithGrad(Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, token_weight: Tensor, *options: Any
    ) -> tuple[Tensor, Tensor]:
        rows = logits.detach().reshape(-1, logits.shape[-1])
        arguments = (targets.reshape(-1), token_weight.reshape(-1), *options)
        if torch.compiler.is_compiling():
            # A graph's functionalization would copy the logits before a kernel in place.
            gradient, parts, losses = loss_and_new_gradient(rows, *arguments)
        else:
            gradient = _separate_rows(rows)
            parts, losses = loss_and_gradient_(gradient, *arguments)
        losses = losses.view(targets.shape)
        ctx.save_for_backward(gradient.view(logits.shape))
        ctx.mark_non_differentiable(losses)
        return parts.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient, None, None, None, None, None, None


def token_losses(
    logits: Tensor,
    targets: Tensor,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """`reference_cross_entropy.token_losses`."""
    options = (ignore_index, label_smoothing, z_loss)
    return losses_and_log_sums(logits, targets, vocab_size, *options)[0]


def loss_and_gradient_(
    logits: Tensor,
    targets: Tensor,
    token_weight: Tensor,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    """`reference_cross_entropy.loss_and_gradient_`; eager only: it works in place.

    Args:
        logits: [T, W] of contiguous rows that don't overlap.
    """
    arguments = (targets, token_weight, vocab_size, ignore_index, label_smoothing, z_loss)
    # So that a backward which needs these logits after all fails instead of being wrong.
    torch.autograd.graph.increment_version(logits)
    return _walk_rows(logits, logits, *arguments)


def _losses_fake(
    logits: Tensor,
    targets: Tensor,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return losses, torch.empty_like(losses, dtype=torch.float64)


@operator(fake=_losses_fake)
def losses_and_log_sums(
    logits: Tensor,
    targets: Tensor,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    """(losses, lse in fp64) [T] of logits [T, W], of which `vocab_size` columns exist."""
    logits, targets = _separate_rows(logits), targets.contiguous()
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    log_sum = torch.empty_like(losses, dtype=torch.float64)
    itemsize = logits.element_size()
    block, num_warps = choose_pass(vocab_size, itemsize)
    if logits.shape[0]:
        with on_device(logits):
            loss_kernel[(logits.shape[0],)](
                logits,
                targets,
                losses,
                log_sum,
                logits.stride(0),
                ignore_index,
                label_smoothing,
                z_loss,
                V=vocab_size,
                LANES=block * itemsize // 16,
                VECTOR=16 // itemsize,
                SMOOTHED=label_smoothing > 0,
                SQUARED=z_loss != 0,
                num_warps=num_warps,
            )
    return losses, log_sum


def _gradient_fake(
    logits: Tensor,
    targets: Tensor,
    log_sum: Tensor,
    dloss: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@operator(fake=_gradient_fake)
def gradient_of_losses(
    logits: Tensor,
    targets: Tensor,
    log_sum: Tensor,
    dloss: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """The gradient by the logits [T, V], a new contiguous tensor."""
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    shares = (0, logits.shape[1], logits.shape[1])
    options = (ignore_index, label_smoothing, z_loss)
    write_gradient(logits, gradient, targets, log_sum, dloss, *shares, *options)
    return gradient


def write_gradient(
    logits: Tensor,
    out: Tensor,
    targets: Tensor,
    log_sum: Tensor,
    dloss: Tensor,
    first_column: int,
    columns: int,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> None:
    """Launch the gradient's kernel; `out` is contiguous, or `logits` itself."""
    rows, width = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    block, num_warps = choose_tile(width, logits.element_size())
    if not rows or not width:
        return
    with on_device(logits):
        gradient_kernel[(rows * ((width + block - 1) // block),)](
            logits,
            out,
            targets.contiguous(),
            log_sum.contiguous(),
            dloss.contiguous(),
            logits.stride(0),
            out.stride(0),
            first_column,
            ignore_index,
            label_smoothing,
            z_loss,
            V=columns,
            W=width,
            CLASSES=vocab_size,
            BLOCK=block,
            num_warps=num_warps,
        )


def _new_gradient_fake(
    logits: Tensor,
    targets: Tensor,
    token_weight: Tensor,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return gradient, losses, torch.empty_like(losses)


@operator(fake=_new_gradient_fake)
def loss_and_new_gradient(
    logits: Tensor,
    targets: Tensor,
    token_weight: Tensor,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient, token_weight * losses, losses); the logits stay as they are."""
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    arguments = (targets, token_weight, vocab_size, ignore_index, label_smoothing, z_loss)
    return gradient, *_walk_rows(_separate_rows(logits), gradient, *arguments)


def _walk_rows(
    logits: Tensor,
    out: Tensor,
    targets: Tensor,
    token_weight: Tensor,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    rows, width = logits.shape
    parts = torch.empty(rows, dtype=torch.float32, device=logits.device)
    losses = torch.empty_like(parts)
    itemsize = logits.element_size()
    walk = choose_walk(vocab_size, itemsize)
    kernel = held_rows_kernel if walk.block >= vocab_size else walked_rows_kernel
    programs = walk.programs * num_multiprocessors(logits)
    if rows:
        with on_device(logits):
            kernel[(min(rows, programs),)](
                logits,
                out,
                targets.contiguous(),
                token_weight.contiguous(),
                parts,
                losses,
                rows,
                logits.stride(0),
                out.stride(0),
                ignore_index,
                label_smoothing,
                z_loss,
                V=vocab_size,
                W=width,
                LANES=walk.block * itemsize // 16,
                VECTOR=16 // itemsize,
                SMOOTHED=label_smoothing > 0,
                SQUARED=z_loss != 0,
                num_warps=walk.num_warps,
                maxnreg=walk.registers,
            )
    return parts, losses


def _separate_rows(logits: Tensor) -> Tensor:
    """The logits [T, W] themselves if their rows are contiguous and don't overlap, else a copy."""
    if logits.stride(1) == 1 and (logits.stride(0) >= logits.shape[1] or logits.shape[0] <= 1):
        return logits
    return logits.contiguous()
