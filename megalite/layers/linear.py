"""Column- and row-parallel linear layers.

Legend: S sequence, B micro-batch; I, O whole input and output features. Hidden states outside a
block are [S/tp, B, H] with sequence parallelism and [S, B, H] without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megalite.layers.shard import Piece, Shard
from megalite.layers.weight_gradients import WeightGradients
from megalite.parallel.group import Pending
from megalite.parallel.tensor import TensorGroup


@dataclass(frozen=True)
class Output:
    """One whole weight [units x features, I] whose rows are dealt to the ranks by whole units.

    Attributes:
        name: of the whole tensor.
        units: heads, or single features. tp divides it, or it divides tp: then each unit is
            copied on tp / units neighbouring ranks.
        features: rows of a unit.
        real_units: units that are no padding; None: all.
    """

    name: str
    units: int
    features: int = 1
    real_units: int | None = None

    def local_rows(self, tp_size: int) -> int:
        """Rows on each rank."""
        return max(1, self.units // tp_size) * self.features


class ColumnParallelLinear(nn.Module):
    """Y = X A with A cut by columns, A = [A_1 .. A_p]: rank i computes Y_i = f(X) A_i.

    The weight holds A_i transposed, [O/tp, I], as torch does; several whole matrices may lie packed
    in it, one below the other.

    Forward: all-gather of X along the sequence (sequence parallelism), else none.
    Backward: the input's gradient is reduce-scattered (all-reduced without sequence parallelism)
    while the weight's gradient is computed; the gathered input is not kept but gathered again while
    the input's gradient is computed.

    Source: Shoeybi et al., "Megatron-LM", arXiv:1909.08053; Korthikanti et al., arXiv:2205.05198.

    Args:
        in_features: I.
        outputs: the whole matrices, in the order in which they are packed.
        tp: the tensor group.
        init_std: standard deviation of initial values.
        weight_gradients: of the stage, for schedules that compute them later; None: never later.
        dtype, device: of the weight.
    """

    def __init__(
        self,
        in_features: int,
        outputs: Sequence[Output],
        *,
        tp: TensorGroup,
        init_std: float = 0.02,
        weight_gradients: WeightGradients | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ):
        super().__init__()
        self.tp, self.weight_gradients = tp, weight_gradients or WeightGradients()
        self.shard = Shard(_pack_pieces(in_features, outputs, tp), init_std)
        rows = sum(output.local_rows(tp.size) for output in outputs)
        self.weight = nn.Parameter(torch.empty(rows, in_features, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[S/tp, B, I] or [S, B, I] -> [S, B, O/tp]."""
        return _ColumnParallel.apply(x, self.weight, self.tp, self.weight_gradients)

    def extra_repr(self) -> str:
        """The shard, for `print(model)`."""
        names = ", ".join(piece.name for piece in self.shard.pieces)
        return f"{names}; weight {tuple(self.weight.shape)}, tp {self.tp.rank}/{self.tp.size}"


class RowParallelLinear(nn.Module):
    """Y = X A with A cut by rows, A = [A_1; ..; A_p]: Y = g(sum over i of X_i A_i).

    The weight holds A_i transposed, [O, I/tp]. The input is already cut along its features, as a
    column-parallel layer leaves it.

    Forward: reduce-scatter along the sequence (all-reduce without sequence parallelism).
    Backward: all-gather (none without sequence parallelism).

    Args:
        in_features, out_features: I, O; tp divides I.
        name: of the whole tensor.
        tp, init_std, weight_gradients, dtype, device: see `ColumnParallelLinear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        name: str,
        tp: TensorGroup,
        init_std: float = 0.02,
        weight_gradients: WeightGradients | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ):
        super().__init__()
        self.tp, self.weight_gradients = tp, weight_gradients or WeightGradients()
        columns = in_features // tp.size
        shape = (out_features, in_features)
        self.shard = Shard((Piece(name, shape, 1, tp.rank * columns, columns),), init_std)
        self.weight = nn.Parameter(torch.empty(out_features, columns, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[S, B, I/tp] -> [S/tp, B, O] or [S, B, O]."""
        return self.tp.leave(_Linear.apply(x, self.weight, self.weight_gradients))

    def extra_repr(self) -> str:
        """The shard, for `print(model)`."""
        name = self.shard.pieces[0].name
        return f"{name}; weight {tuple(self.weight.shape)}, tp {self.tp.rank}/{self.tp.size}"


LINEAR = (ColumnParallelLinear, RowParallelLinear)
"""Layers whose weight gradients a schedule may compute later."""


def _pack_pieces(in_features: int, outputs: Sequence[Output], tp: TensorGroup) -> tuple[Piece, ...]:
    pieces, local_start = [], 0
    for output in outputs:
        rows = output.local_rows(tp.size)
        replicas = max(1, tp.size // output.units)
        start = tp.rank // replicas * rows
        real_rows = (output.real_units or output.units) * output.features
        pieces.append(
            Piece(
                name=output.name,
                shape=(real_rows, in_features),
                dim=0,
                start=min(start, real_rows),
                length=max(0, min(start + rows, real_rows) - start),
                local_start=local_start,
                replicas=replicas,
                replica=tp.rank % replicas,
                partial=replicas > 1,
            )
        )
        local_start += rows
    return tuple(pieces)


class _Linear(Function):
    """x A^T, whose weight gradient may be left for later."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, later: WeightGradients) -> Tensor:
        ctx.save_for_backward(x, weight)
        # What is saved may come back as another tensor, computed again; this stays the parameter.
        ctx.parameter, ctx.later = weight, later
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        ctx.later.await_weight(ctx.parameter)
        x, weight = ctx.saved_tensors
        dx = dy @ weight
        if not ctx.needs_input_grad[1] or ctx.later.defer(ctx.parameter, dy, x):
            return dx, None, None
        return dx, ctx.later.give(ctx.parameter, dy, x), None


class _ColumnParallel(Function):
    """The product, and the order of communication and computation in its backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: nn.Parameter, tp: TensorGroup, later: WeightGradients
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tp, ctx.parameter, ctx.later = tp, weight, later
        whole = tp.start_all_gather(x).wait() if tp.sequence_parallel else x
        return F.linear(whole, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        ctx.later.await_weight(ctx.parameter)
        x, weight = ctx.saved_tensors
        tp: TensorGroup = ctx.tp
        cut = tp.sequence_parallel
        reduce = tp.start_reduce_scatter if cut else tp.start_all_reduce
        if not ctx.needs_input_grad[1] or ctx.later.defer(
            ctx.parameter, dy, x, tp if cut else None
        ):
            return reduce(dy @ weight).wait(), None, None, None
        gathered = tp.start_all_gather(x) if cut else Pending(x)
        input_gradient = reduce(dy @ weight)
        product = ctx.later.give(ctx.parameter, dy, gathered.wait())
        return input_gradient.wait(), product, None, None
