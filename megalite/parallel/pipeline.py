"""The process-group manager of the pipeline axis: messages between stages."""

from __future__ import annotations

from collections.abc import Sequence
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
        is_send: the direction.
        tag: equal on both sides; gloo delivers by it, NCCL by the order alone.
    """

    tensor: Tensor
    peer: int
    is_send: bool
    tag: int = 0


class PipelineGroup(AxisGroup):
    """The ranks that pass activations and gradients along the stages.

    Args:
        rank, size, process_group: see `AxisGroup`.
        embedding_group: first and last stage's ranks, if they share a tied embedding and this is
            one of them.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        process_group: dist.ProcessGroup | None = None,
        *,
        embedding_group: AxisGroup | None = None,
    ):
        super().__init__(rank, size, process_group)
        self.embedding_group = embedding_group or AxisGroup()

    def connect(self, device: torch.device) -> None:
        """Pass one number around the ring in both directions.

        NCCL connects two ranks at their first message of a direction, and the host waits for the
        other's host meanwhile. In the middle of a schedule that can close a circle: that host may
        itself wait, in loading a kernel, for a message which this host has not started yet.
        """
        if self.size == 1:
            return
        following, preceding = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        for target, source in ((following, preceding), (preceding, following)):
            sent, received = torch.ones(1, device=device), torch.empty(1, device=device)
            messages = [Message(sent, target, True), Message(received, source, False)]
            for work in self.exchange(messages):
                work.wait()

    def exchange(self, messages: Sequence[Message]) -> list[dist.Work]:
        """Start all messages as one batch; shapes and order are known on both sides.

        Returns:
            Handles to wait for: one for the whole batch (NCCL) or one per message (gloo).
        """
        operations = [
            dist.P2POp(
                dist.isend if message.is_send else dist.irecv,
                message.tensor,
                self.world_ranks[message.peer],
                self.process_group,
                message.tag,
            )
            for message in messages
        ]
        return dist.batch_isend_irecv(operations)
