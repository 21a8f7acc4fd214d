"""DualPipe-V: two directions on one V, a forward of one beside a backward of the other. No torch.

Source: the "cut in half" form of DeepSeek-AI's DualPipe (arXiv:2412.19437, section 3.2.1) by Sea AI
Lab. There the neighbours of a forward and a backward run at once, so that the exchange of one's
experts hides behind the other's arithmetic; a dense model runs them one after the other.
"""

from __future__ import annotations

from megalite.pipeline.actions import Op, Order
from megalite.pipeline.phases import Phases


def dualpipe_v_order(num_ranks: int, num_micro_batches: int, _: int) -> list[Order]:
    """At most p + 1/2 micro-batches are kept until their weight gradients.

    Makespan n (f + b) + (p - 1) f / 2 if f, i, w are equal and n >= p.

    The order needs 2 p micro-batches; of fewer it is what is left without those that do not exist.
    """
    return [_rank_order(rank, num_ranks, num_micro_batches) for rank in range(num_ranks)]


def _rank_order(rank: int, num_ranks: int, num_micro_batches: int) -> Order:
    after = num_ranks - rank - 1
    down, back = rank, 2 * num_ranks - 1 - rank
    forward, forward_back = (down, Op.FORWARD), (back, Op.FORWARD)
    backward, backward_back = (down, Op.INPUT_GRADIENT), (back, Op.INPUT_GRADIENT)
    phases = Phases()
    # Fill the way down, then both ways.
    phases.repeat(2 * after, forward)
    phases.repeat(rank + 1, forward, forward_back)
    # The first gradients come back; their weight gradients fill the waits.
    phases.repeat(after, backward_back, forward_back)
    # Both directions at full rate.
    steady = max(num_micro_batches, 2 * num_ranks) - 2 * num_ranks + rank + 1
    phases.repeat(steady, forward, backward_back, forward_back, backward)
    # No more micro-batches enter.
    phases.repeat(after, backward_back, forward_back, backward)
    phases.repeat(rank + 1, backward_back, backward)
    phases.repeat(after, backward)
    return phases.order(num_micro_batches)
