"""The process-group manager of the data axis: replicas that see different samples."""

from __future__ import annotations

from torch import Tensor

from megalite.parallel.group import AxisGroup, Pending


class DataGroup(AxisGroup):
    """The ranks that hold the same weights and sum their gradients."""

    def start_gradient_sum(self, bucket: Tensor) -> Pending:
        """Sum a flat bucket of gradients over the replicas, in place.

        A sum, not a mean: each token's loss is already divided by the tokens of the global batch,
        so replicas with different token counts weigh as they should.
        """
        return self.start_all_reduce(bucket)
