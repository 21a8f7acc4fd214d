"""The cross-entropies in plain torch: the definition that their kernels are tested against.

The loss of a token with logits z and target y over V classes, s the label smoothing:

    lse = log sum_v exp(z_v)
    loss = (1 - s) (lse - z_y) + s/V sum_v (lse - z_v) + z_loss lse^2
    dloss/dz_v = p_v (1 + 2 z_loss lse) - s/V - (1 - s) [v = y],    p_v = exp(z_v - lse)

bf16 and fp16 logits are computed in fp32 and their gradients rounded once at the end; losses and
statistics are fp32, or fp64 for fp64 logits.

Sources: Szegedy et al., arXiv:1512.00567 (label smoothing); Chowdhery et al., "PaLM",
arXiv:2204.02311, section 5 (z-loss); Shoeybi et al., "Megatron-LM", arXiv:1909.08053, section 3 (a
vocabulary that is cut over ranks).

Legend: T tokens (any leading shape where it says [...]), V classes, W columns of the logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Negative log likelihood of each target.

    Args:
        logits: [..., V]; left as they are.
        targets: int64 [...], from 0 to below V or `ignore_index`. The loss of any other is NaN, so
            that the sum tells (asking before would wait for the GPU); its gradient says nothing.
        ignore_index: tokens with this target have loss 0 and no gradient.
        label_smoothing: s.
        z_loss: factor of lse^2.

    Returns:
        [...], at least fp32.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ignored = targets == ignore_index
    missing = ~ignored & ((targets < 0) | (targets >= z.shape[-1]))
    losses = F.cross_entropy(
        z.reshape(-1, z.shape[-1]),
        targets.masked_fill(missing, ignore_index).reshape(-1),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    ).view(targets.shape)
    if z_loss:
        square = z.logsumexp(-1).square()
        losses = losses + z_loss * square.masked_fill(ignored, 0.0)
    return losses.masked_fill(missing, torch.nan)


def cross_entropy_with_grad(
    logits: Tensor,
    targets: Tensor,
    token_weight: Tensor,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the losses, and the final gradient in the logits' place.

    THE CALLER GIVES THE LOGITS AWAY: if a gradient will be needed, the forward overwrites their
    memory with token_weight * dloss/dz, and the backward returns that memory as it is. So the
    gradient that comes into the total must be 1 (call `total.backward()`; scale by `token_weight`,
    not afterwards): it is not looked at, which would cost a synchronization. Whatever made the
    logits must not need them in its own backward; a matrix product doesn't. With gradients off,
    or logits that need none, they stay as they are.

    Args:
        logits: [..., W].
        targets: int64 [...], below `vocab_size` or `ignore_index`; see `cross_entropy`.
        token_weight: fp32 [...]: what each loss counts. A weight of 0 adds 0 to the sum and makes
            the row's gradient 0, whatever its logits are: inf and NaN too.
        vocab_size: classes V; the columns from there on are padding, which enters neither the sum
            nor any gradient (theirs is 0). None: all W.
        ignore_index, label_smoothing, z_loss: see `cross_entropy`.

    Returns:
        (sum of token_weight * loss, a scalar that is differentiable by the logits; losses [...],
        not differentiable), at least fp32.
    """
    options = (vocab_size or logits.shape[-1], ignore_index, label_smoothing, z_loss)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _WithGrad.apply(logits, targets, token_weight, *options)
    rows = logits.detach().reshape(-1, logits.shape[-1])
    losses = token_losses(rows, targets.reshape(-1), *options)
    return weighted(losses, token_weight.reshape(-1)).sum(), losses.view(targets.shape)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weight: Tensor,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`cross_entropy_with_grad` of the logits hidden @ weight^T, which are made whole, in fp32.

    What `fused.linear_cross_entropy` computes a chunk of tokens at a time; arguments and results
    are described there. Both gradients come from autograd: the incoming one must be 1 here too.
    """
    precise = torch.promote_types(hidden.dtype, torch.float32)
    logits = F.linear(hidden.to(precise), weight.to(precise))
    options = (vocab_size, ignore_index, label_smoothing, z_loss)
    return cross_entropy_with_grad(logits, targets, token_weight, *options)


class _WithGrad(Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, token_weight: Tensor, *options: Any
    ) -> tuple[Tensor, Tensor]:
        rows = logits.detach().reshape(-1, logits.shape[-1])
        parts, losses = loss_and_gradient_(
            rows, targets.reshape(-1), token_weight.reshape(-1), *options
        )
        losses = losses.view(targets.shape)
        ctx.save_for_backward(rows.view(logits.shape))
        ctx.mark_non_differentiable(losses)
        return parts.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient, *[None] * 6


def token_losses(
    logits: Tensor,
    targets: Tensor,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """Losses [T] of logits [T, W], of which `vocab_size` columns exist; no gradient."""
    options = (ignore_index, label_smoothing, z_loss)
    return cross_entropy(logits[:, :vocab_size], targets, *options)


def loss_and_gradient_(
    logits: Tensor,
    targets: Tensor,
    token_weight: Tensor,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    """(token_weight * losses, losses) [T]; the logits [T, W] become the gradient of the former."""
    losses = token_losses(logits, targets, vocab_size, ignore_index, label_smoothing, z_loss)
    z = logits[:, :vocab_size].to(losses.dtype)
    gradient = token_weight.masked_fill(targets == ignore_index, 0.0)
    log_sum = z.logsumexp(-1)
    vocab_parallel_gradient_(
        *(logits, targets, log_sum, gradient, 0, vocab_size, vocab_size, label_smoothing, z_loss)
    )
    return weighted(losses, token_weight), losses


def weighted(losses: Tensor, token_weight: Tensor) -> Tensor:
    """token_weight * losses, and 0 where the weight is: a masked token's loss may be inf."""
    return token_weight.to(losses.dtype) * losses.masked_fill(token_weight == 0, 0.0)


def vocab_parallel_statistics(
    logits: Tensor, targets: Tensor, first_column: int, columns: int, summed: bool = True
) -> Tensor:
    """What a rank's part of the vocabulary adds to each token's loss.

    Args:
        logits: [T, W], this rank's columns.
        targets: int64 [T], of the whole vocabulary.
        first_column: the whole vocabulary's index of column 0.
        columns: the first of the W columns that exist; the rest are padding. May be 0.
        summed: compute the sum of z, which label smoothing needs; else its place holds 0.

    Returns:
        [T, 4], at least fp32: maximum of z, sum of exp(z - maximum), the target's logit (0 if it
        is another rank's), sum of z. (-inf, 0, 0, 0) without columns.
    """
    z = logits[:, :columns].to(torch.promote_types(logits.dtype, torch.float32))
    if not columns:
        empty = z.new_zeros(logits.shape[0], 4)
        empty[:, 0] = -torch.inf
        return empty
    local = targets - first_column
    elsewhere = (local < 0) | (local >= columns)
    at_target = z.gather(1, local.masked_fill(elsewhere, 0)[:, None])[:, 0]
    maximum = z.amax(1)
    # A rank's logits may all be -inf where another's aren't.
    finite = maximum.clamp_min(torch.finfo(z.dtype).min)
    exponentials = (z - finite[:, None]).exp().sum(1)
    at_target = at_target.masked_fill(elsewhere, 0.0)
    total = z.sum(1) if summed else torch.zeros_like(maximum)
    return torch.stack([maximum, exponentials, at_target, total], 1)


def vocab_parallel_gradient_(
    logits: Tensor,
    targets: Tensor,
    log_sum: Tensor,
    gradient: Tensor,
    first_column: int,
    columns: int,
    vocab_size: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> None:
    """Overwrite a rank's logits with the gradient by them, 0 on the padding.

    Args:
        logits: [T, W], this rank's columns.
        targets: int64 [T], of the whole vocabulary.
        log_sum: [T], lse over all ranks' columns. In fp64, which costs nothing, it also serves
            logits so large that fp32 would round lse too coarsely for exp(z - lse).
        gradient: [T], the gradient that comes into each loss; 0 for a token that is ignored, whose
            row becomes 0 whatever it holds.
        first_column, columns: see `vocab_parallel_statistics`.
        vocab_size: classes over all ranks, V.
        label_smoothing, z_loss: see `cross_entropy`.
    """
    z = logits[:, :columns].to(torch.promote_types(logits.dtype, torch.float32))
    coarse = log_sum.to(z.dtype)
    fine = (log_sum - coarse).to(z.dtype)
    result = (z - coarse[:, None] - fine[:, None]).exp_()
    result *= (1 + 2 * z_loss * coarse)[:, None]
    result -= label_smoothing / vocab_size
    local = targets - first_column
    here = (local >= 0) & (local < columns)
    if columns:
        confidence = here.to(z.dtype) * (1 - label_smoothing)
        result.scatter_add_(1, local.masked_fill(~here, 0)[:, None], -confidence[:, None])
    result = result.mul_(gradient[:, None])
    # Not a product by zero: what is masked may be NaN.
    logits[:, :columns] = result.masked_fill_((gradient == 0)[:, None], 0.0)
    logits[:, columns:] = 0
