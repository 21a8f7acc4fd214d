"""DualPipe-V: two directions on one V, a forward of one beside a backward of the other. No torch.

Source: the "cut in half" form of DeepSeek-AI's DualPipe (arXiv:2412.19437, section 3.2.1) by Sea AI
Lab. There the neighbours of a forward and a backward run at once, so that the exchange of one's
experts hides behind the other's arithmetic; a dense model runs them one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator

from megalite.pipeline.actions import Action, Op, Order


def dualpipe_v_order(num_ranks: int, num_micro_batches: int, _: int) -> list[Order]:
    """At most p + 1/2 micro-batches are kept until their weight gradients.

    The order needs 2 p micro-batches; of fewer it is what is left without those that do not exist.
    """
    enough = max(num_micro_batches, 2 * num_ranks)
    return [
        tuple(a for a in _order(rank, num_ranks, enough) if a.micro_batch < num_micro_batches)
        for rank in range(num_ranks)
    ]


def _order(rank: int, num_ranks: int, num_micro_batches: int) -> Iterator[Action]:
    down, back = rank, 2 * num_ranks - 1 - rank
    after = num_ranks - rank - 1
    micro_batches = {
        (stage, op): iter(range(num_micro_batches))
        for stage in (down, back)
        for op in (Op.FORWARD, Op.INPUT_GRADIENT)
    }

    def times(count: int, *kinds: tuple[int, Op]) -> Iterator[Action]:
        for _ in range(count):
            for stage, op in kinds:
                yield Action(stage, op, next(micro_batches[stage, op]))

    forward, backward = (down, Op.FORWARD), (down, Op.INPUT_GRADIENT)
    forward_back, backward_back = (back, Op.FORWARD), (back, Op.INPUT_GRADIENT)
    # Fill the way down, then both ways.
    yield from times(2 * after, forward)
    yield from times(rank + 1, forward, forward_back)
    # The first gradients come back; their weight gradients fill the waits.
    yield from times(after, backward_back, forward_back)
    # Both directions at full rate.
    steady = num_micro_batches - 2 * num_ranks + rank + 1
    yield from times(steady, forward, backward_back, forward_back, backward)
    # No more micro-batches enter.
    yield from times(after, backward_back, forward_back, backward)
    yield from times(rank + 1, backward_back, backward)
    yield from times(after, backward)
