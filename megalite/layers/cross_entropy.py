"""Cross-entropy over a vocabulary that is cut over the tensor ranks.

The kernels' statistics of a rank's columns (maximum, sum of exponentials, label's logit) travel in
one all-gather of 4 floats per token; all else is local. The fourth, the sum of the logits, is
computed for label smoothing only.

Legend: S sequence, B micro-batch, H hidden, V vocabulary (padded), T = S B tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megalite.parallel.tensor import TensorGroup
from megalite_kernels import (
    cross_entropy_with_grad,
    linear_cross_entropy,
    vocab_parallel_gradient_,
    vocab_parallel_statistics,
)
from megalite_kernels.fused.linear_cross_entropy import CHUNK_ROWS, chunked_loss_and_gradients
from megalite_kernels.reference_cross_entropy import weighted


def vocab_parallel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    tp: TensorGroup,
    *,
    overwrite: bool = False,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Negative log likelihood of each label: log sum_v exp(z_v) - z_label.

    Columns from `vocab_size` on are padding: they enter neither the sum nor any gradient.

    Args:
        logits: [S, B, V/tp], this rank's columns `[tp.rank V/tp, ...)`.
        labels: int64 [S, B], below `vocab_size` or `ignore_index`.
        vocab_size: columns that exist, over all ranks.
        tp: the tensor group.
        overwrite: the caller gives the logits away, and the backward, which can then run once
            only, writes their gradient in their place.
        ignore_index: tokens with this label have loss 0 and no gradient.
        label_smoothing, z_loss: see `megalite_kernels.reference_cross_entropy`.

    Returns:
        [S, B], fp32 (fp64 for fp64 logits), equal on all ranks.

    Forward: all-gather of the statistics. Keeps the logits.
    Backward: none; the gradient is softmax - onehot(label), on this rank's columns.

    Source: Shoeybi et al., "Megatron-LM", arXiv:1909.08053, section 3.
    """
    options = _Options(ignore_index, label_smoothing, z_loss)
    return _VocabParallelCrossEntropy.apply(logits, labels, vocab_size, tp, overwrite, options)


def vocab_parallel_loss_with_grad(
    logits: Tensor,
    labels: Tensor,
    token_weight: Tensor,
    vocab_size: int,
    tp: TensorGroup,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Sum of the weighted losses, with its gradient made at once in the logits' place.

    THE CALLER GIVES THE LOGITS AWAY: if a gradient will be needed, the forward overwrites them with
    it, and the gradient that comes into the total must be 1; see
    `megalite_kernels.reference_cross_entropy.cross_entropy_with_grad`.

    Args:
        logits, labels, vocab_size, tp: see `vocab_parallel_cross_entropy`.
        token_weight: [S, B], what each loss counts; 0 gives 0.
        ignore_index, label_smoothing, z_loss: see `vocab_parallel_cross_entropy`.

    Returns:
        (scalar, differentiable by the logits; losses [S, B], not differentiable), at least fp32,
        equal on all ranks.

    Forward: all-gather of the statistics, none on one rank. Backward: none.
    """
    options = _Options(ignore_index, label_smoothing, z_loss)
    if tp.size == 1:
        return cross_entropy_with_grad(logits, labels, token_weight, vocab_size, *options)
    if torch.is_grad_enabled() and logits.requires_grad:
        arguments = (logits, labels, token_weight, vocab_size, tp, options)
        return _VocabParallelLossWithGrad.apply(*arguments)
    share = _Share.of(logits.shape[-1], vocab_size, tp)
    losses, _ = _losses(logits.detach().flatten(0, -2), labels.flatten(), share, options, tp)
    losses = losses.view(labels.shape)
    return weighted(losses, token_weight).sum(), losses


def vocab_parallel_linear_loss_with_grad(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weight: Tensor,
    vocab_size: int,
    tp: TensorGroup,
    main_grad: Tensor | None = None,
    chunk_rows: int = CHUNK_ROWS,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`vocab_parallel_loss_with_grad` of a column-parallel projection, logits never whole.

    Both gradients are made in the forward: THE GRADIENT THAT COMES INTO THE TOTAL MUST BE 1.
    THE FORWARD ADDS TO `main_grad`, so call it outside of regions that are recomputed. What does
    not require a gradient, alike on all ranks, gets none, and none is computed.

    Args:
        hidden: [S/tp, B, H] with sequence parallelism, else [S, B, H].
        weight: [V/tp, H], same dtype.
        labels, token_weight, vocab_size, tp: see `vocab_parallel_loss_with_grad`.
        main_grad: fp32 [V/tp, H] that the weight's gradient is added to in the forward, if the
            weight requires one; it then gets none from autograd. None: autograd gets it.
        chunk_rows: tokens whose logits are in memory at a time, at most.
        ignore_index, label_smoothing, z_loss: see `vocab_parallel_cross_entropy`.

    Returns:
        (scalar, differentiable by hidden and weight; losses [S, B], not differentiable).

    Forward, per chunk of tokens: z = x W^T; all-gather of the statistics; z becomes dz in place;
    dx = dz W; dW += dz^T x, in fp32. Before it, the hidden states are gathered (sequence
    parallelism); after it, dx is summed over the ranks: reduce-scatter, else all-reduce.
    Backward: none.
    """
    options = _Options(ignore_index, label_smoothing, z_loss)
    tensors = (hidden, weight, labels, token_weight)
    if tp.size == 1:
        return linear_cross_entropy(*tensors, main_grad, chunk_rows, vocab_size, *options)
    arguments = (*tensors, vocab_size, tp, main_grad, chunk_rows, options)
    return _VocabParallelLinear.apply(*arguments, torch.is_grad_enabled())


class _Options(NamedTuple):
    """Of the loss, as the kernels take them."""

    ignore_index: int
    label_smoothing: float
    z_loss: float


class _Share(NamedTuple):
    """A rank's columns: the first one's index in the whole vocabulary, and how many are real."""

    first_column: int
    columns: int
    vocab_size: int

    @classmethod
    def of(cls, width: int, vocab_size: int, tp: TensorGroup) -> _Share:
        first = tp.rank * width
        return cls(first, max(0, min(width, vocab_size - first)), vocab_size)


class _VocabParallelCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        tp: TensorGroup,
        overwrite: bool,
        options: _Options,
    ) -> Tensor:
        ctx.share = _Share.of(logits.shape[-1], vocab_size, tp)
        ctx.overwrite, ctx.loss_options = overwrite, options
        rows = logits.flatten(0, -2)
        losses, log_sum = _losses(rows, labels.flatten(), ctx.share, options, tp)
        ctx.save_for_backward(logits, labels, log_sum)
        return losses.view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, log_sum = ctx.saved_tensors
        rows = logits.detach().flatten(0, -2)
        gradient = rows if ctx.overwrite else rows.clone()
        incoming = (labels.flatten(), log_sum, dloss.flatten())
        _gradient_(gradient, *incoming, ctx.share, ctx.loss_options)
        return gradient.view(logits.shape), *[None] * 5


class _VocabParallelLossWithGrad(Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        token_weight: Tensor,
        vocab_size: int,
        tp: TensorGroup,
        options: _Options,
    ) -> tuple[Tensor, Tensor]:
        share = _Share.of(logits.shape[-1], vocab_size, tp)
        rows = logits.detach().flatten(0, -2)
        labels_, weights = labels.flatten(), token_weight.flatten()
        losses, log_sum = _losses(rows, labels_, share, options, tp)
        _gradient_(rows, labels_, log_sum, weights, share, options)
        losses = losses.view(labels.shape)
        ctx.save_for_backward(rows.view(logits.shape))
        ctx.mark_non_differentiable(losses)
        return weighted(losses, token_weight).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient, *[None] * 5


class _VocabParallelLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        token_weight: Tensor,
        vocab_size: int,
        tp: TensorGroup,
        main_grad: Tensor | None,
        chunk_rows: int,
        options: _Options,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        share = _Share.of(weight.shape[0], vocab_size, tp)
        whole = tp.start_all_gather(hidden).wait() if tp.sequence_parallel else hidden
        labels_, weights = labels.flatten(), token_weight.flatten()

        def loss_of(logits: Tensor, chunk: slice, backward: bool) -> tuple[Tensor, Tensor]:
            losses, log_sum = _losses(logits, labels_[chunk], share, options, tp)
            if backward:
                _gradient_(logits, labels_[chunk], log_sum, weights[chunk], share, options)
            return weighted(losses, weights[chunk]), losses

        wants_hidden = grad_enabled and hidden.requires_grad
        wants_weight = grad_enabled and weight.requires_grad
        returns_weight = wants_weight and main_grad is None
        parts, losses, dhidden, dweight = chunked_loss_and_gradients(
            whole.flatten(0, -2),
            weight,
            main_grad if wants_weight else None,
            wants_hidden,
            returns_weight,
            chunk_rows,
            loss_of,
        )
        losses = losses.view(labels.shape)
        if wants_hidden:
            summed = tp.start_reduce_scatter if tp.sequence_parallel else tp.start_all_reduce
            dhidden = summed(dhidden.view(whole.shape)).wait()
        kept = (dhidden if wants_hidden else None, dweight if returns_weight else None)
        ctx.save_for_backward(*kept)
        ctx.mark_non_differentiable(losses)
        return parts.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.saved_tensors, *[None] * 8


def _losses(
    logits: Tensor, labels: Tensor, share: _Share, options: _Options, tp: TensorGroup
) -> tuple[Tensor, Tensor]:
    """(losses, log sum of exponentials in fp64) [T] of this rank's logits [T, V/tp]."""
    smoothing = options.label_smoothing
    columns = (share.first_column, share.columns)
    statistics = vocab_parallel_statistics(logits, labels, *columns, smoothing > 0)
    parts = tp.start_all_gather(statistics).wait()
    maximum, exponentials, label_z, total = _combine(parts.view(tp.size, *statistics.shape))
    log_d = exponentials.log()
    # The maximum may be so large that it and the logarithm don't fit one fp32 together.
    losses = (maximum - label_z) + log_d
    if smoothing:
        everywhere = (maximum - total / share.vocab_size) + log_d
        losses = (1 - smoothing) * losses + smoothing * everywhere
    if options.z_loss:
        losses = losses + options.z_loss * (maximum + log_d).square()
    exists = (labels >= 0) & (labels < share.vocab_size)
    losses = losses.masked_fill(~exists, torch.nan)
    losses = losses.masked_fill(labels == options.ignore_index, 0.0)
    return losses, maximum.double() + log_d


def _gradient_(
    logits: Tensor,
    labels: Tensor,
    log_sum: Tensor,
    gradient: Tensor,
    share: _Share,
    options: _Options,
) -> None:
    """This rank's logits [T, V/tp] become the gradient; `gradient` [T] comes into the losses."""
    gradient = gradient.masked_fill(labels == options.ignore_index, 0.0)
    numbers = (options.label_smoothing, options.z_loss)
    vocab_parallel_gradient_(logits, labels, log_sum, gradient, *share, *numbers)


def _combine(parts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ranks' statistics [tp, T, 4] as the whole row's, each [T]."""
    maximum = parts[..., 0].amax(0)
    exponentials = (parts[..., 1] * (parts[..., 0] - maximum).exp()).sum(0)
    return maximum, exponentials, parts[..., 2].sum(0), parts[..., 3].sum(0)
