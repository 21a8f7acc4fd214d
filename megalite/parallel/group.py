"""What the managers of all axes share: a rank, a size, and collectives without gradients.

A group of size 1 has no process group and its verbs are identities, so that one rank runs the same
code as many. The managers of the axes are `TensorGroup`, `PipelineGroup` and `DataGroup`; a layer
or optimizer is handed the one whose axis it uses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.parallel.activity import CallTrace

# torch 2.13 renamed these two; the old names warn there, the new ones are missing before.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Pending:
    """The result of a collective under way.

    `wait` returns the tensor once it may be used: at once on a group of size 1, when the
    collective has finished on the CPU, and with the current stream made to wait on a GPU.
    `inputs` are kept until then.
    """

    tensor: Tensor
    work: dist.Work | None = None
    inputs: Tensor | None = None
    trace: CallTrace | None = None
    number: int = 0

    def wait(self) -> Tensor:
        """The finished tensor."""
        if self.work is not None:
            assert self.trace is not None, "work under way is a call that was traced"
            self.trace.waiting = self.number
            self.work.wait()
            self.trace.waiting = 0
            self.work = self.inputs = None
        return self.tensor


class AxisGroup:
    """One rank's view of its group on one axis.

    Args:
        rank: place in the group, 0 first.
        size: ranks of the group.
        process_group: torch's handle; None exactly if the size is 1.

    Attributes:
        rank, size, process_group: as given.
        world_ranks: world rank of each member.
        trace: the collectives called so far, for whoever explains a hang.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        process_group: dist.ProcessGroup | None = None,
    ):
        assert (process_group is None) == (size == 1), f"size {size} with {process_group}"
        self.rank, self.size, self.process_group = rank, size, process_group
        self.world_ranks = (
            tuple(dist.get_process_group_ranks(process_group)) if process_group else (0,)
        )
        self.trace = CallTrace()

    @property
    def is_first(self) -> bool:
        """Whether this is the group's first rank."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this is the group's last rank."""
        return self.rank == self.size - 1

    def all_reduce(self, x: Tensor, *, maximum: bool = False) -> Tensor:
        """Sum (or maximum) over the ranks, in place; every rank holds the same result."""
        return self.start_all_reduce(x, maximum=maximum).wait()

    def start_all_reduce(self, x: Tensor, *, maximum: bool = False) -> Pending:
        """`all_reduce` under way; `x` must be contiguous and is changed in place."""
        if self.size == 1:
            return Pending(x)
        op = dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM
        number = self.trace.call("all_reduce")
        work = dist.all_reduce(x, op, self.process_group, async_op=True)
        return Pending(x, work, None, self.trace, number)

    def start_all_gather(self, x: Tensor) -> Pending:
        """Concatenate the ranks' tensors along dim 0: [n, ...] -> [size n, ...]."""
        if self.size == 1:
            return Pending(x)
        out = torch.empty((self.size * x.shape[0], *x.shape[1:]), dtype=x.dtype, device=x.device)
        return self.start_all_gather_into(out, x.contiguous())

    def start_all_gather_into(self, whole: Tensor, own: Tensor) -> Pending:
        """`start_all_gather` into a contiguous tensor, of which `own` may be this rank's part."""
        if self.size == 1:
            return Pending(whole.copy_(own))
        number = self.trace.call("all_gather")
        work = _all_gather_single(whole, own, group=self.process_group, async_op=True)
        return Pending(whole, work, own, self.trace, number)

    def start_reduce_scatter(self, x: Tensor, *, into: Tensor | None = None) -> Pending:
        """Sum over the ranks, of which each keeps its part of dim 0: [size n, ...] -> [n, ...].

        Args:
            x: the whole.
            into: where the sum goes, contiguous; it may be this rank's part of `x`. None: into a
                new tensor.
        """
        if self.size == 1:
            return Pending(x)
        if into is None:
            shape = x.shape[0] // self.size, *x.shape[1:]
            into = torch.empty(shape, dtype=x.dtype, device=x.device)
        x = x.contiguous()
        number = self.trace.call("reduce_scatter")
        work = _reduce_scatter_single(into, x, group=self.process_group, async_op=True)
        return Pending(into, work, x, self.trace, number)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """Copy `x` of the rank `source` of this group to all its ranks, in place."""
        if self.size == 1:
            return x
        number = self.trace.call("broadcast")
        root = self.world_ranks[source]
        work = dist.broadcast(x, root, self.process_group, async_op=True)
        return Pending(x, work, None, self.trace, number).wait()
