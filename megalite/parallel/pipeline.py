"""The process-group manager of the pipeline axis: messages between stages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.parallel.group import AxisGroup


@dataclass(frozen=True)
class Message:
    """One tensor to or from another pipeline rank.

    Attributes:
        tensor: sent, or received into; contiguous.
        peer: the other's rank on the pipeline axis.
        is_send: whether it leaves this rank.
        later: its way: from an earlier rank to a later one, or back.
        tag: equal on both sides; gloo delivers by it, NCCL by the order alone.
    """

    tensor: Tensor
    peer: int
    is_send: bool
    later: bool
    tag: int = 0


class PipelineGroup(AxisGroup):
    """The ranks that pass activations and gradients along the stages.

    Messages to later ranks and messages to earlier ones have a process group each, apart from that
    of collectives, so that on a GPU they run on streams of their own and nothing waits for what it
    does not need. Within a direction messages run in the order in which they are started.

    Args:
        rank, size, process_group: see `AxisGroup`; of collectives.
        later_group, earlier_group: of the same ranks, for messages to later and to earlier ranks;
            None exactly if the size is 1.
        embedding_group: first and last stage's ranks, if they share a tied embedding and this is
            one of them.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        process_group: dist.ProcessGroup | None = None,
        *,
        later_group: dist.ProcessGroup | None = None,
        earlier_group: dist.ProcessGroup | None = None,
        embedding_group: AxisGroup | None = None,
    ):
        super().__init__(rank, size, process_group)
        for group in (later_group, earlier_group):
            assert (group is None) == (size == 1), f"size {size} with {group}"
        self._later_group, self._earlier_group = later_group, earlier_group
        self.embedding_group = embedding_group or AxisGroup()

    def connect(self, device: torch.device) -> None:
        """Pass one number between neighbours in both directions, and from end to end.

        NCCL connects two ranks at their first message of a direction, and the host waits for the
        other's host meanwhile. In the middle of a schedule that can close a circle: that host may
        itself wait, in loading a kernel, for a message which this host has not started yet.
        """
        pairs = [(rank, rank + 1) for rank in range(self.size - 1)]
        if self.size > 2:
            pairs.append((0, self.size - 1))
        for pair in pairs:
            for later in (True, False):
                source, target = pair if later else pair[::-1]
                if self.rank in pair:
                    is_send = self.rank == source
                    peer, number = target if is_send else source, torch.ones(1, device=device)
                    self.start(Message(number, peer, is_send, later=later)).wait()

    def start(self, message: Message) -> dist.Work:
        """Begin to send or receive; shapes and order are known on both sides."""
        call = dist.isend if message.is_send else dist.irecv
        group = self._later_group if message.later else self._earlier_group
        peer = self.world_ranks[message.peer]
        work = call(message.tensor, peer, group, message.tag)
        assert work is not None, "this rank is in the group"
        return work
