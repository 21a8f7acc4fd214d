"""Weights that are whole on a rank only while they are used (ZeRO level 3).

Every rank of a shard group keeps its part of each bucket. Before a layer is used, forward or
backward, its bucket is gathered; when the next one is, its memory is given back. The one that comes
next is gathered while the one before computes, past the end of an action too, as the plan says what
follows. So two buckets are whole at a time.

Weight gradients need no weights, so an action that computes only those gathers nothing for itself.

Sources: Rajbhandari et al., "ZeRO", arXiv:1910.02054; Zhao et al., "PyTorch FSDP",
arXiv:2304.11277, for storage that is given back under tensors that stay.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from torch import Tensor

from megalite.parallel.group import AxisGroup, Pending
from megalite.pipeline.actions import Use


class GatheredWeights:
    """The whole buckets of a rank, one or two of them there at a time.

    Args:
        shards: the shard group.
        wholes: by bucket; their storage is given back here.
        own: what this rank keeps of each, by bucket.
        forward, backward: of each stage: its buckets in the order in which a forward uses them, and
            a backward.
    """

    def __init__(
        self,
        shards: AxisGroup,
        wholes: Mapping[int, Tensor],
        own: Mapping[int, Tensor],
        forward: Mapping[int, Sequence[int]],
        backward: Mapping[int, Sequence[int]],
    ):
        self._shards, self._wholes, self._own = shards, wholes, own
        self._forward, self._backward = forward, backward
        self._bytes = {number: whole.nbytes for number, whole in wholes.items()}
        self._there: dict[int, Pending] = {}
        self._current: int | None = None
        self._ahead: deque[int] = deque()
        for number in wholes:
            self._free(number)

    def __contains__(self, number: int) -> bool:
        """Whether a bucket is one of these."""
        return number in self._wholes

    def begin(self, use: Use | None, following: Use | None) -> None:
        """An action begins.

        Args:
            use: its own; None: it needs no weights.
            following: of the next action of this rank that does.
        """
        self._ahead = deque(self._order(use) if use else ())
        if following is not None:
            self._ahead.extend(self._order(following)[:1])
        if use is None:
            self._gather_ahead()

    def use(self, number: int) -> None:
        """A bucket's weights may be read afterwards, until another bucket is used.

        Every rank of the shard group calls it for the same buckets in the same order.
        """
        ahead = self._ahead
        if number == self._current:
            # Again, or for the first time in an action that begins where the last one ended.
            if ahead and ahead[0] == number:
                ahead.popleft()
                self._gather_ahead()
            return
        if self._current is not None:
            self._free(self._current)
        self._gather(number).wait()
        self._current = number
        if number in ahead:
            while ahead.popleft() != number:
                pass
        self._gather_ahead()

    def forget(self, number: int) -> None:
        """A bucket's weights have changed."""
        if number in self._there:
            self._free(number)

    def _order(self, use: Use) -> Sequence[int]:
        """Buckets that an action uses, one after the other."""
        stage, is_backward = use
        return self._backward[stage] if is_backward else self._forward[stage]

    def _gather_ahead(self) -> None:
        if self._ahead:
            self._gather(self._ahead[0])

    def _gather(self, number: int) -> Pending:
        """Of a bucket, under way unless it is there."""
        if number not in self._there:
            whole = self._wholes[number]
            whole.untyped_storage().resize_(self._bytes[number])
            self._there[number] = self._shards.start_all_gather_into(whole, self._own[number])
        return self._there[number]

    def _free(self, number: int) -> None:
        """Give a bucket's memory back; views of it stay, and have it again when it is gathered."""
        pending = self._there.pop(number, None)
        if pending is not None:
            pending.wait()  # nobody may write into it any more
        self._wholes[number].untyped_storage().resize_(0)
        if self._current == number:
            self._current = None
