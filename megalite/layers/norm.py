"""RMSNorm: its weight is copied on every tensor rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megalite.layers.shard import Piece, Shard
from megalite.parallel.tensor import TensorGroup
from megalite_kernels import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the features.

    With sequence parallelism each rank sees its part of the sequence only, so the copies' gradients
    are parts of a sum over the tensor group; without it they are equal. No collective runs here:
    the gradient buffer sums partial copies once per step.

    Args:
        hidden_size: H.
        eps: added to the mean square.
        name: of the whole tensor.
        tp, dtype, device: as in `ColumnParallelLinear`.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float,
        *,
        name: str,
        tp: TensorGroup,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ):
        super().__init__()
        self.eps = eps
        piece = Piece(
            name,
            (hidden_size,),
            0,
            0,
            hidden_size,
            replicas=tp.size,
            replica=tp.rank,
            partial=tp.sequence_parallel,
        )
        self.shard = Shard((piece,), init_std=None)
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        return rms_norm(x, self.weight, self.eps)


class AddRMSNorm(RMSNorm):
    """RMSNorm of a sum that is needed too: of a block's output and the residual stream.

    The sum is rounded once and read once.
    """

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """[..., H] twice -> (norm of their sum, their sum), each [..., H]."""
        return add_rms_norm(x, residual, self.weight, self.eps)
