"""Cross-entropy over a vocabulary that is cut over the tensor ranks.

The kernels' statistics of a rank's columns (maximum, sum of exponentials, label's logit) travel in
one all-gather of 4 floats per token; all else is local.

Legend: S sequence, B micro-batch, H hidden, V vocabulary (padded), T = S B tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from megalite.parallel.tensor import TensorGroup
from megalite_kernels import (
    cross_entropy_with_grad,
    vocab_parallel_gradient_,
    vocab_parallel_statistics,
)
from megalite_kernels.fused.linear_cross_entropy import CHUNK_ROWS, accumulate_product_, even_chunks
from megalite_kernels.reference_cross_entropy import weighted


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, vocab_size: int, tp: TensorGroup, *, overwrite: bool = False
) -> Tensor:
    """Negative log likelihood of each label: log sum_v exp(z_v) - z_label.

    Columns from `vocab_size` on are padding: they enter neither the sum nor any gradient.

    Args:
        logits: [S, B, V/tp], this rank's columns `[tp.rank V/tp, ...)`.
        labels: int64 [S, B], below `vocab_size`.
        vocab_size: columns that exist, over all ranks.
        tp: the tensor group.
        overwrite: the caller gives the logits away, and the backward, which can then run once
            only, writes their gradient in their place.

    Returns:
        [S, B], fp32 (fp64 for fp64 logits), equal on all ranks.

    Forward: all-gather of the statistics. Keeps the logits.
    Backward: none; the gradient is softmax - onehot(label), on this rank's columns.

    Source: Shoeybi et al., "Megatron-LM", arXiv:1909.08053, section 3.
    """
    return _VocabParallelCrossEntropy.apply(logits, labels, vocab_size, tp, overwrite)


def vocab_parallel_loss_with_grad(
    logits: Tensor, labels: Tensor, token_weight: Tensor, vocab_size: int, tp: TensorGroup
) -> tuple[Tensor, Tensor]:
    """Sum of the weighted losses, with its gradient made at once in the logits' place.

    THE CALLER GIVES THE LOGITS AWAY: if a gradient will be needed, the forward overwrites them with
    it, and the gradient that comes into the total must be 1; see
    `megalite_kernels.reference_cross_entropy.cross_entropy_with_grad`.

    Args:
        logits, labels, vocab_size, tp: see `vocab_parallel_cross_entropy`.
        token_weight: [S, B], what each loss counts; 0 gives 0.

    Returns:
        (scalar, differentiable by the logits; losses [S, B], not differentiable), at least fp32,
        equal on all ranks.

    Forward: all-gather of the statistics, none on one rank. Backward: none.
    """
    if tp.size == 1:
        return cross_entropy_with_grad(logits, labels, token_weight, vocab_size)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _VocabParallelLossWithGrad.apply(logits, labels, token_weight, vocab_size, tp)
    share = _Share.of(logits.shape[-1], vocab_size, tp)
    losses, _ = _losses(logits.detach().flatten(0, -2), labels.flatten(), share, tp)
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
) -> tuple[Tensor, Tensor]:
    """`vocab_parallel_loss_with_grad` of a column-parallel projection, logits never whole.

    Both gradients are made in the forward: THE GRADIENT THAT COMES INTO THE TOTAL MUST BE 1.

    Args:
        hidden: [S/tp, B, H] with sequence parallelism, else [S, B, H].
        weight: [V/tp, H].
        labels, token_weight, vocab_size, tp: see `vocab_parallel_loss_with_grad`.
        main_grad: fp32 [V/tp, H] that the weight's gradient is added to in the forward; the weight
            then gets none from autograd. None: autograd gets it.
        chunk_rows: tokens whose logits are in memory at a time, at most.

    Returns:
        (scalar, differentiable by hidden and weight; losses [S, B], not differentiable).

    Forward, per chunk of tokens: z = x W^T; all-gather of the statistics; z becomes dz in place;
    dx = dz W; dW += dz^T x, in fp32. Before it, the hidden states are gathered (sequence
    parallelism); after it, dx is summed over the ranks: reduce-scatter, else all-reduce.
    Backward: none.
    """
    arguments = (hidden, weight, labels, token_weight, vocab_size, tp, main_grad, chunk_rows)
    return _VocabParallelLinear.apply(*arguments, torch.is_grad_enabled())


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
    ) -> Tensor:
        ctx.share = _Share.of(logits.shape[-1], vocab_size, tp)
        ctx.overwrite = overwrite
        losses, log_sum = _losses(logits.flatten(0, -2), labels.flatten(), ctx.share, tp)
        ctx.save_for_backward(logits, labels, log_sum)
        return losses.view(labels.shape)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, labels, log_sum = ctx.saved_tensors
        rows = logits.detach().flatten(0, -2)
        gradient = rows if ctx.overwrite else rows.clone()
        vocab_parallel_gradient_(gradient, labels.flatten(), log_sum, dloss.flatten(), *ctx.share)
        return gradient.view(logits.shape), None, None, None, None


class _VocabParallelLossWithGrad(Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        token_weight: Tensor,
        vocab_size: int,
        tp: TensorGroup,
    ) -> tuple[Tensor, Tensor]:
        share = _Share.of(logits.shape[-1], vocab_size, tp)
        rows = logits.detach().flatten(0, -2)
        losses = _losses_and_gradient_(rows, labels.flatten(), token_weight.flatten(), share, tp)
        losses = losses.view(labels.shape)
        ctx.save_for_backward(rows.view(logits.shape))
        ctx.mark_non_differentiable(losses)
        return weighted(losses, token_weight).sum(), losses

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient, None, None, None, None


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
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        share = _Share.of(weight.shape[0], vocab_size, tp)
        whole = tp.start_all_gather(hidden).wait() if tp.sequence_parallel else hidden
        rows, labels_, weights = whole.flatten(0, -2), labels.flatten(), token_weight.flatten()
        precise = torch.promote_types(hidden.dtype, torch.float32)
        losses = rows.new_empty(rows.shape[0], dtype=precise)
        target = main_grad
        if target is None and grad_enabled:
            target = torch.zeros(weight.shape, dtype=precise, device=weight.device)
        length = even_chunks(rows.shape[0], chunk_rows)
        workspace = rows.new_empty(length, weight.shape[0])
        dhidden = torch.empty_like(rows) if grad_enabled else None
        for start in range(0, rows.shape[0], length):
            chunk = slice(start, min(start + length, rows.shape[0]))
            x = rows[chunk]
            z = torch.mm(x, weight.t(), out=workspace[: x.shape[0]])
            if dhidden is None or target is None:
                losses[chunk], _ = _losses(z, labels_[chunk], share, tp)
                continue
            losses[chunk] = _losses_and_gradient_(z, labels_[chunk], weights[chunk], share, tp)
            torch.mm(z, weight, out=dhidden[chunk])
            accumulate_product_(target, z.t(), x)
        losses = losses.view(labels.shape)
        if dhidden is not None and target is not None:
            dhidden = dhidden.view(whole.shape)
            summed = tp.start_reduce_scatter if tp.sequence_parallel else tp.start_all_reduce
            dhidden = summed(dhidden).wait()
            dweight = target.to(weight.dtype) if main_grad is None else None
            ctx.save_for_backward(dhidden, dweight)
        ctx.mark_non_differentiable(losses)
        return weighted(losses, token_weight).sum(), losses

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        return dhidden, dweight, *[None] * 7


def _losses(
    logits: Tensor, labels: Tensor, share: _Share, tp: TensorGroup
) -> tuple[Tensor, Tensor]:
    """(losses, log sum of exponentials in fp64) [T] of this rank's logits [T, V/tp]."""
    statistics = vocab_parallel_statistics(logits, labels, share.first_column, share.columns)
    parts = tp.start_all_gather(statistics).wait()
    maximum, exponentials, label_z = _combine(parts.view(tp.size, *statistics.shape))
    log_d = exponentials.log()
    # The maximum may be so large that it and the logarithm don't fit one fp32 together.
    return (maximum - label_z) + log_d, maximum.double() + log_d


def _losses_and_gradient_(
    logits: Tensor, labels: Tensor, token_weight: Tensor, share: _Share, tp: TensorGroup
) -> Tensor:
    """Losses [T]; this rank's logits [T, V/tp] become the gradient of the weighted losses."""
    losses, log_sum = _losses(logits, labels, share, tp)
    vocab_parallel_gradient_(logits, labels, log_sum, token_weight, *share)
    return losses


def _combine(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ranks' statistics [tp, T, 4] as the whole row's: maximum, sum, label's logit. [T]"""
    maximum = parts[..., 0].amax(0)
    exponentials = (parts[..., 1] * (parts[..., 0] - maximum).exp()).sum(0)
    return maximum, exponentials, parts[..., 2].sum(0)
