"""The output projection and its cross-entropy together, a chunk of tokens at a time.

The matrix products are torch's on every device; between them stands the cross-entropy that writes
its gradient over the logits.

Legend: T tokens (any leading shape where it says [...]), H hidden, V rows of the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megalite_kernels import reference_cross_entropy
from megalite_kernels.backend import runs_fused
from megalite_kernels.fused.launch import operator
from megalite_kernels.products import accumulate_product_

CHUNK_ROWS = 8192
"""Tokens of a chunk: fewer starve the products (2048: 4 to 9% slower), more only take memory."""

LossOfChunk = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor]]
"""(logits [t, V], their tokens, whether a backward follows) to (weighted losses, losses) [t].

If a backward follows, the logits are overwritten with the gradient of the weighted losses.
"""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weight: Tensor,
    main_grad: Tensor | None = None,
    chunk_rows: int | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(sum of token_weight * loss, losses) of the logits hidden @ weight^T.

    Both gradients are made in the forward, so THE GRADIENT THAT COMES INTO THE TOTAL MUST BE 1, as
    for `cross_entropy_with_grad`. Per chunk: z = x W^T; z becomes dz in place; dx = dz W;
    dW += dz^T x, in fp32. Definition: `reference_cross_entropy.linear_cross_entropy`.

    THE FORWARD ADDS TO `main_grad`, so call it outside of regions that are recomputed
    (`torch.utils.checkpoint`), whose forward runs twice. Autocast is not looked at: hidden and
    weight share a dtype, which the products are made in.

    Args:
        hidden: [..., H].
        weight: [V, H], same dtype.
        targets: int64 [...], below `vocab_size` or `ignore_index`.
        token_weight: fp32 [...]: what each loss counts; 0 silences logits of inf and NaN, but not
            such hidden states: the weight's gradient is a product with them.
        main_grad: fp32 [V, H] that the weight's gradient is added to, as soon as the forward, if
            the weight requires one; it then gets none from autograd. None: autograd gets it, in the
            weight's dtype.
        chunk_rows: tokens of a chunk at most (the chunks are even); None: CHUNK_ROWS.
        vocab_size, ignore_index, label_smoothing, z_loss: see `cross_entropy_with_grad`.

    Returns:
        (scalar that is differentiable by hidden and weight; losses [...], not differentiable), at
        least fp32.

    Memory beyond the gradients: chunk_rows x V logits and, without `main_grad` and with several
    chunks, an fp32 [V, H]. Products: 6 T H V operations, of which none are done twice.

    Sources: Liger-Kernel (chunks over tokens, the gradient in the logits' place; its weight
    gradient accumulated by the product itself), QuACK.
    """
    return _LinearCrossEntropy.apply(
        *(hidden, weight, targets, token_weight, main_grad),
        chunk_rows or CHUNK_ROWS,
        vocab_size or weight.shape[0],
        ignore_index,
        float(label_smoothing),
        float(z_loss),
        torch.is_grad_enabled(),
    )


def even_chunks(rows: int, at_most: int) -> int:
    """Rows of each chunk (the last may have less), so that no chunk is much thinner than others."""
    count = max(1, -(-rows // at_most))
    return max(1, -(-rows // count))


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        token_weight: Tensor,
        main_grad: Tensor | None,
        chunk_rows: int,
        vocab_size: int,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        wants_weight = grad_enabled and weight.requires_grad
        ctx.wants = (grad_enabled and hidden.requires_grad, wants_weight and main_grad is None)
        parts, losses, dhidden, dweight = linear_loss_and_gradients(
            hidden.detach().reshape(-1, hidden.shape[-1]),
            weight.detach(),
            targets.reshape(-1),
            token_weight.reshape(-1),
            main_grad if wants_weight else None,
            ctx.wants[0],
            ctx.wants[1],
            chunk_rows,
            vocab_size,
            ignore_index,
            label_smoothing,
            z_loss,
        )
        # In their last shape: a view that autograd made of one could become a leaf's `grad`, and
        # what is added to that would be added to what a kept graph returns next.
        ctx.save_for_backward(
            dhidden.view(hidden.shape) if ctx.wants[0] else None,
            dweight if ctx.wants[1] else None,
        )
        losses = losses.view(targets.shape)
        ctx.mark_non_differentiable(losses)
        return parts.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.saved_tensors, *[None] * 9


def _fake(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wants_hidden, wants_weight = rest[3:5]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    losses = hidden.new_empty(hidden.shape[0], dtype=dtype)
    dhidden = hidden.new_empty(hidden.shape if wants_hidden else (0,))
    dweight = weight.new_empty(weight.shape if wants_weight else (0,))
    return losses, torch.empty_like(losses), dhidden, dweight


@operator(fake=_fake, mutates=("main_grad",))
def linear_loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weight: Tensor,
    main_grad: Tensor | None,
    wants_hidden: bool,
    wants_weight: bool,
    chunk_rows: int,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(token_weight * losses, losses, dhidden, dweight); empty what isn't wanted."""
    options = (vocab_size, ignore_index, label_smoothing, z_loss)

    def loss_of(logits: Tensor, chunk: slice, backward: bool) -> tuple[Tensor, Tensor]:
        if backward:
            return _loss_and_gradient_(logits, targets[chunk], token_weight[chunk], *options)
        losses = _losses(logits, targets[chunk], *options)
        return reference_cross_entropy.weighted(losses, token_weight[chunk]), losses

    wanted = (main_grad, wants_hidden, wants_weight)
    return chunked_loss_and_gradients(hidden, weight, *wanted, chunk_rows, loss_of)


def chunked_loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    main_grad: Tensor | None,
    wants_hidden: bool,
    wants_weight: bool,
    chunk_rows: int,
    loss_of: LossOfChunk,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weighted losses, losses, dhidden, dweight), logits chunk by chunk; empty what isn't wanted.

    Args:
        hidden: [T, H].
        weight: [V, H].
        main_grad: fp32 [V, H], which the weight's gradient is added to.
        wants_hidden, wants_weight: whether to return each gradient, in its tensor's dtype.
        chunk_rows: tokens of a chunk at most.
        loss_of: what makes the losses.
    """
    rows, features = hidden.shape
    length = even_chunks(rows, chunk_rows)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    parts = torch.empty(rows, dtype=dtype, device=hidden.device)
    losses = torch.empty_like(parts)
    dhidden = hidden.new_empty((rows, features) if wants_hidden else (0,))
    one_chunk = wants_weight and 0 < rows <= length
    target = main_grad
    if wants_weight and not one_chunk:
        target = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
    dweight = weight.new_empty(weight.shape if one_chunk else (0,))
    workspace = hidden.new_empty(length, weight.shape[0])
    backward = wants_hidden or wants_weight or main_grad is not None
    for start in range(0, rows, length):
        chunk = slice(start, min(start + length, rows))
        x = hidden[chunk]
        z = torch.mm(x, weight.t(), out=workspace[: x.shape[0]])
        parts[chunk], losses[chunk] = loss_of(z, chunk, backward)
        if wants_hidden:
            torch.mm(z, weight, out=dhidden[chunk])
        if one_chunk:
            # A product with bf16 results is faster, and rounds once as well.
            torch.mm(z.t(), x, out=dweight)
        elif target is not None:
            accumulate_product_(target, z.t(), x)
    if wants_weight and not one_chunk:
        assert target is not None
        dweight = target.to(weight.dtype)
    return parts, losses, dhidden, dweight


def _losses(logits: Tensor, *arguments: Any) -> Tensor:
    if runs_fused(logits):
        from megalite_kernels.fused.cross_entropy import token_losses

        return token_losses(logits, *arguments)
    return reference_cross_entropy.token_losses(logits, *arguments)


def _loss_and_gradient_(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    if runs_fused(logits):
        from megalite_kernels.fused.cross_entropy import loss_and_gradient_

        return loss_and_gradient_(logits, *arguments)
    return reference_cross_entropy.loss_and_gradient_(logits, *arguments)
