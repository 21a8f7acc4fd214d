"""Cross-entropy over a vocabulary that is cut over the tensor ranks.

Legend: S sequence, B micro-batch, V vocabulary (padded).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from megalite.parallel.tensor import TensorGroup


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, vocab_size: int, tp: TensorGroup
) -> Tensor:
    """Negative log likelihood of each label: log sum_v exp(z_v) - z_label.

    Columns from `vocab_size` on are padding: they enter neither the sum nor any gradient.

    Args:
        logits: [S, B, V/tp], this rank's columns `[tp.rank V/tp, ...)`.
        labels: int64 [S, B], below `vocab_size`.
        vocab_size: columns that exist, over all ranks.
        tp: the tensor group.

    Returns:
        [S, B], fp32 (fp64 for fp64 logits), equal on all ranks.

    Forward: all-reduce of the maximum, then of (sum of exponentials, label's logit).
    Backward: none; the gradient is softmax - onehot(label), on this rank's columns.

    Source: Shoeybi et al., "Megatron-LM", arXiv:1909.08053, section 3.
    """
    return _VocabParallelCrossEntropy.apply(logits, labels, vocab_size, tp)


class _VocabParallelCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, vocab_size: int, tp: TensorGroup
    ) -> Tensor:
        columns = logits.shape[-1]
        first = tp.rank * columns
        real = max(0, min(columns, vocab_size - first))
        z = logits[..., :real].to(torch.promote_types(logits.dtype, torch.float32))
        if real:
            maximum = z.amax(dim=-1)
        else:
            maximum = z.new_full(labels.shape, -torch.inf)
        maximum = tp.all_reduce(maximum, maximum=True)
        z = z - maximum[..., None]
        local_label = labels - first
        elsewhere = (local_label < 0) | (local_label >= real)
        local_label = local_label.masked_fill(elsewhere, 0)
        if real:
            label_z = z.gather(-1, local_label[..., None])[..., 0].masked_fill(elsewhere, 0.0)
        else:
            label_z = torch.zeros_like(maximum)
        exponentials = z.exp_()
        sums = tp.all_reduce(torch.stack([exponentials.sum(dim=-1), label_z]))
        softmax = exponentials.div_(sums[0][..., None])
        ctx.save_for_backward(softmax, local_label, elsewhere)
        ctx.columns, ctx.dtype = columns, logits.dtype
        return sums[0].log() - sums[1]

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None, None]:
        softmax, local_label, elsewhere = ctx.saved_tensors
        real = softmax.shape[-1]
        gradient = dloss.new_zeros((*softmax.shape[:-1], ctx.columns), dtype=ctx.dtype)
        if real:
            # Not in place: a graph that is kept may run its backward again.
            z_gradient = softmax * dloss[..., None]
            at_label = -dloss.masked_fill(elsewhere, 0.0)
            z_gradient.scatter_add_(-1, local_label[..., None], at_label[..., None])
            gradient[..., :real] = z_gradient
        return gradient, None, None, None
