"""Do data ranks still hold the same? A bit that flips in one rank's memory changes its replica
without a word, and spreads with its gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from megalite.errors import RunError
from megalite.exit_codes import ExitCode
from megalite.optim.flat import FlatParameters
from megalite.optim.optimizer import Optimizer
from megalite.parallel.agree import name_ranks
from megalite.parallel.data import DataGroup


def check_replicas(step: int, flat: FlatParameters, optimizer: Optimizer, dp: DataGroup) -> None:
    """Compare sums over the bits of all weights, and of the optimizer states that this rank owns.

    All ranks call it, after `optimizer.validate()`; one collective over dp, for which the host
    waits. A single flipped bit always changes a sum.

    Raises:
        RunError: replicas differ; with three or more that should agree the odd ones are named.
    """
    weights = _sum_of_bits((p for p, _ in flat.whole_parameters()), flat.device)
    states = (optimizer.master, optimizer.exp_avg, optimizer.exp_avg_sq)
    owned = _sum_of_bits((part for kind in states for part in kind), flat.device)
    told = dp.start_all_gather(torch.stack([weights, owned])[None]).wait().tolist()
    # Neighbours own different shards; ranks that are as far apart as a shard group is long, equal.
    shards = dp.shards.size
    alike = {"weights": [range(dp.size)]}
    alike["optimizer states"] = [range(shard, dp.size, shards) for shard in range(shards)]
    for column, (what, groups) in enumerate(alike.items()):
        for members in groups:
            odd = odd_ones([told[rank][column] for rank in members])
            if odd is not None:
                ranks = [dp.world_ranks[rank] for rank in members]
                raise RunError(_sentence(step, what, ranks, odd), ExitCode.DAMAGED)


def odd_ones(sums: Sequence[int]) -> list[int] | None:
    """Which of equal replicas differ from the majority, by place; empty if there is no majority;
    None if none differs."""
    (most, votes), *others = Counter(sums).most_common()
    if not others:
        return None
    return [i for i, value in enumerate(sums) if value != most] if 2 * votes > len(sums) else []


def _sentence(step: int, what: str, ranks: Sequence[int], odd: Sequence[int]) -> str:
    said = f"after step {step} the {what} of data ranks differ that should be equal"
    if odd:
        wrong = [ranks[place] for place in odd]
        rest = [rank for rank in ranks if rank not in wrong]
        said += f": {name_ranks(wrong)} from {name_ranks(rest)}, which agree"
        return f"{said}; look at the memory of the machine of {name_ranks(wrong)}"
    return f"{said}: {name_ranks(ranks)}; which of them is right cannot be told"


def _sum_of_bits(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Sum of tensors' elements, their bits taken for whole numbers; int64 []."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    total = torch.zeros((), dtype=torch.int64, device=device)
    for tensor in tensors:
        bits = tensor.detach().view(words[tensor.element_size()])
        total += bits.sum(dtype=torch.int64).to(device)
    return total
