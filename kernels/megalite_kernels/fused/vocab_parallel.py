"""Cross-entropy over a vocabulary that is cut over ranks: what each rank does between collectives.

Source: NVIDIA Transformer Engine's parallel cross-entropy (one pass of online statistics, one
collective of a few floats per token); here the gradient keeps the logits' dtype and place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalite_kernels.fused.cross_entropy import write_gradient
from megalite_kernels.fused.cross_entropy_kernels import choose_pass, statistics_kernel
from megalite_kernels.fused.launch import on_device, operator

NEVER = -(2**62)
"""A target that no token has: tokens to be ignored come with the gradient 0."""


def _statistics_fake(
    logits: Tensor, targets: Tensor, first_column: int, columns: int, summed: bool = True
) -> Tensor:
    return logits.new_empty((logits.shape[0], 4), dtype=torch.float32)


@operator(fake=_statistics_fake)
def vocab_parallel_statistics(
    logits: Tensor, targets: Tensor, first_column: int, columns: int, summed: bool = True
) -> Tensor:
    """`reference_cross_entropy.vocab_parallel_statistics`: arguments and result.

    [T, W] in fp32, fp16 or bf16 -> fp32 [T, 4], the last 0 unless `summed`. Floor: 2 B/logit in
    bf16, each read once.
    """
    rows = logits.shape[0]
    statistics = torch.empty((rows, 4), dtype=torch.float32, device=logits.device)
    if not columns:
        statistics.zero_()[:, 0] = -torch.inf
        return statistics
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    itemsize = logits.element_size()
    block, num_warps = choose_pass(columns, itemsize)
    if rows:
        with on_device(logits):
            statistics_kernel[(rows,)](
                logits,
                targets.contiguous(),
                statistics,
                logits.stride(0),
                first_column,
                V=columns,
                LANES=block * itemsize // 16,
                VECTOR=16 // itemsize,
                SUMMED=summed,
                num_warps=num_warps,
            )
    return statistics


def _nothing(
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
    return


@operator(fake=_nothing, mutates=("logits",))
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
    """`reference_cross_entropy.vocab_parallel_gradient_`: arguments and effect.

    Rows of the logits must be contiguous. Floor: 4 B/logit in bf16.
    """
    shares = (first_column, columns, vocab_size)
    options = (NEVER, float(label_smoothing), float(z_loss))
    torch.autograd.graph.increment_version(logits)
    write_gradient(logits, logits, targets, log_sum, gradient, *shares, *options)
