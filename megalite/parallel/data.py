"""The process-group manager of the data axis: replicas that see different samples."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.parallel.group import AxisGroup, Pending


class DataGroup(AxisGroup):
    """The ranks that see different samples and sum their gradients.

    They are a grid: the ranks of a shard group own one shard each of what they sum, and ranks of
    different shard groups that own the same shard are its replicas. With a shard group for each
    rank all own everything (ZeRO level 0); with one for all, each owns 1/dp.

    Args:
        rank, size, process_group: see `AxisGroup`.
        shards: the shard group; None: this rank alone.
        replicas: of this rank's shard; None: all ranks, if `shards` is None, else this rank alone.

    Attributes:
        shards, replicas: see above.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        process_group: dist.ProcessGroup | None = None,
        *,
        shards: AxisGroup | None = None,
        replicas: AxisGroup | None = None,
    ):
        super().__init__(rank, size, process_group)
        self.shards: AxisGroup = shards or AxisGroup()
        self.replicas: AxisGroup = replicas or (AxisGroup() if shards else self)
        assert self.shards.size * self.replicas.size == size, "shards and replicas make up the axis"

    def start_shard_sum(self, bucket: Tensor) -> Pending:
        """Sum a flat bucket of gradients over the shard group, in place: this rank's shard of it.

        A sum, not a mean: each token's loss is already divided by the tokens of the global batch,
        so ranks with different token counts weigh as they should.

        Args:
            bucket: [n], n divisible by the size of the shard group; its other shards are undefined
                afterwards.

        Returns:
            [n / shards], a view of `bucket`.
        """
        own = bucket.chunk(self.shards.size)[self.shards.rank]
        return self.shards.start_reduce_scatter(bucket, into=own)

    def start_gradient_sum(self, bucket: Tensor) -> Pending:
        """As `start_shard_sum`, over all ranks: each shard over its replicas too."""
        if self.shards.size == 1:
            return self.replicas.start_all_reduce(bucket)
        scattered = self.start_shard_sum(bucket)
        if self.replicas.size == 1:
            return scattered
        if not bucket.is_cuda:
            return self.replicas.start_all_reduce(scattered.wait())
        # On a stream of its own, so that no computation waits between the two.
        with torch.cuda.stream(torch.cuda.Stream(bucket.device)):
            return self.replicas.start_all_reduce(scattered.wait())
