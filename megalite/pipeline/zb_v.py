"""ZB-V: zero bubbles in the memory of 1F1B, on a V. No torch import.

Source: Qi et al., "Zero Bubble Pipeline Parallelism", arXiv:2401.10241, section 6.
"""

from __future__ import annotations

from megalite.pipeline.actions import Op, Order
from megalite.pipeline.phases import Phases


def zb_v_order(num_ranks: int, num_micro_batches: int, _: int) -> list[Order]:
    """At most p micro-batches are kept until their weight gradients.

    Makespan n (f + b) + (p - 1) f / 2 if f, i, w are equal and n >= p: what is left is the time
    until the first micro-batch reaches the last rank.
    """
    return [_rank_order(rank, num_ranks, num_micro_batches) for rank in range(num_ranks)]


def _rank_order(rank: int, num_ranks: int, num_micro_batches: int) -> Order:
    after = num_ranks - rank - 1
    down, back = rank, 2 * num_ranks - 1 - rank
    forward, forward_back = (down, Op.FORWARD), (back, Op.FORWARD)
    backward, backward_back = (down, Op.INPUT_GRADIENT), (back, Op.INPUT_GRADIENT)
    phases = Phases()
    # As many forwards as memory allows, until the first comes back up.
    phases.repeat(2 * after + 1, forward)
    phases.repeat(rank, forward_back, forward)
    # Its gradient is here; no more micro-batches enter until it is back on this rank's way down.
    phases.repeat(after + 1, forward_back, backward_back)
    # All four in turn, and then without those that enter.
    entered = 2 * after + 1 + rank
    phases.repeat(num_micro_batches - entered, forward, backward, forward_back, backward_back)
    phases.repeat(after, backward, forward_back, backward_back)
    # The gradients left.
    phases.repeat(rank, backward, backward_back)
    phases.repeat(after + 1, backward)
    return phases.order(num_micro_batches)
