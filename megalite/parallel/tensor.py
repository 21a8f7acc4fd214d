"""The process-group manager of the tensor axis, and its verbs with gradients.

A tensor-parallel block is y = g(F(f(x))): f brings the input to every rank of the group, F works
on the rank's share of the weights, g sums the ranks' partial results. With plain tensor parallelism
the hidden states outside a block are whole on every rank, [S, B, H]; with sequence parallelism each
rank holds a contiguous part of the sequence, [S/tp, B, H].

                        forward            backward
    copy                identity           all-reduce          f
    reduce              all-reduce         identity            g
    gather_sequence     all-gather         reduce-scatter      f with sequence parallelism
    scatter_sequence    reduce-scatter     all-gather          g with sequence parallelism
    split_sequence      own part           all-gather

Sources: Shoeybi et al., "Megatron-LM", arXiv:1909.08053 (f and g); Korthikanti et al., "Reducing
activation recomputation in large transformer models", arXiv:2205.05198 (with sequence parallelism).

Legend: S sequence, B micro-batch, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, contiguous_format
from torch.autograd import Function

from megalite.parallel.group import AxisGroup


class TensorGroup(AxisGroup):
    """The ranks that share every matrix.

    Args:
        rank, size, process_group: see `AxisGroup`.
        sequence_parallel: hidden states between blocks are split along the sequence.
        kv_group: the ranks that hold copies of the same key/value head, if there are more such
            ranks than one and fewer than all.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        process_group: dist.ProcessGroup | None = None,
        *,
        sequence_parallel: bool = False,
        kv_group: AxisGroup | None = None,
    ):
        super().__init__(rank, size, process_group)
        self.sequence_parallel = sequence_parallel and size > 1
        self.kv_group = kv_group

    @classmethod
    def solo(cls) -> TensorGroup:
        """A group of one rank: any layer works with it, in a notebook too."""
        return cls()

    def replica_group(self, replicas: int) -> AxisGroup:
        """The ranks that hold the same copy of a tensor of which there are `replicas` copies."""
        if replicas == self.size:
            return self
        assert self.kv_group is not None and self.kv_group.size == replicas, replicas
        return self.kv_group

    def enter(self, x: Tensor) -> Tensor:
        """f: hidden states into a block. [S/tp, B, H] or [S, B, H] -> [S, B, H]."""
        return self.gather_sequence(x) if self.sequence_parallel else self.copy(x)

    def leave(self, x: Tensor) -> Tensor:
        """g: partial sums out of a block. [S, B, H] -> [S/tp, B, H] or [S, B, H]."""
        return self.scatter_sequence(x) if self.sequence_parallel else self.reduce(x)

    def copy(self, x: Tensor) -> Tensor:
        """Forward: identity. Backward: all-reduce. Any shape."""
        return x if self.size == 1 else _Copy.apply(x, self)

    def reduce(self, x: Tensor) -> Tensor:
        """Forward: all-reduce. Backward: identity. Any shape."""
        return x if self.size == 1 else _Reduce.apply(x, self)

    def gather_sequence(self, x: Tensor) -> Tensor:
        """Forward: all-gather on dim 0, [S/tp, ...] -> [S, ...]. Backward: reduce-scatter."""
        return x if self.size == 1 else _GatherSequence.apply(x, self)

    def scatter_sequence(self, x: Tensor) -> Tensor:
        """Forward: reduce-scatter on dim 0, [S, ...] -> [S/tp, ...]. Backward: all-gather."""
        return x if self.size == 1 else _ScatterSequence.apply(x, self)

    def split_sequence(self, x: Tensor) -> Tensor:
        """Forward: this rank's part of dim 0, [S, ...] -> [S/tp, ...]. Backward: all-gather.

        The input must be the same on all ranks.
        """
        return x if self.size == 1 else _SplitSequence.apply(x, self)

    def first_position(self, length: int) -> int:
        """Place in the sequence of this rank's first hidden state, of `length` here."""
        return self.rank * length if self.sequence_parallel else 0

    def local_part(self, x: Tensor) -> Tensor:
        """This rank's contiguous part of dim 0, without a gradient rule of its own."""
        length = x.shape[0] // self.size
        return x.narrow(0, self.rank * length, length)


class _Copy(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorGroup) -> Tensor:
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.tp.all_reduce(dy.clone(memory_format=contiguous_format)), None


class _Reduce(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorGroup) -> Tensor:
        return tp.all_reduce(x.clone(memory_format=contiguous_format))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class _GatherSequence(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorGroup) -> Tensor:
        ctx.tp = tp
        return tp.start_all_gather(x).wait()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.tp.start_reduce_scatter(dy).wait(), None


class _ScatterSequence(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorGroup) -> Tensor:
        ctx.tp = tp
        return tp.start_reduce_scatter(x).wait()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.tp.start_all_gather(dy).wait(), None


class _SplitSequence(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorGroup) -> Tensor:
        ctx.tp = tp
        return tp.local_part(x).clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.tp.start_all_gather(dy).wait(), None
