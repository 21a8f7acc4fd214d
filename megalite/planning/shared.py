"""What all ranks plan by has to be the same, bit by bit: plans compare these numbers.

Sums over ranks may differ by a rounding from one communicator to the next, and GPUs may have
unlike memory; a rank that plans by its own numbers may wait for messages that no one sends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.config import Config
from megalite.parallel.groups import ParallelGroups
from megalite.planning.block_costs import ModelCosts, stage_costs
from megalite.planning.choice import Choice, best, candidates, predict, refuse_too_much

USABLE = 0.92
"""Share of a GPU's memory that a plan may fill; the rest is the libraries' and fragments."""


def from_first_rank(x: Tensor, groups: ParallelGroups) -> Tensor:
    """Copy `x` of world rank 0 to all ranks, in place. All ranks call it."""
    for group in (groups.pp, groups.dp, groups.tp):
        group.broadcast(x, 0)
    return x


def sum_over_ranks(x: Tensor, groups: ParallelGroups) -> Tensor:
    """Sum over all ranks, in place: world rank 0's sum, on every rank. All ranks call it."""
    for group in (groups.tp, groups.dp, groups.pp):
        group.all_reduce(x)
    return from_first_rank(x, groups)


def memory_limit(config: Config, groups: ParallelGroups, device: torch.device) -> float:
    """What every rank may use [bytes]: `--memory-limit`, or what the smallest GPU has.

    CPUs have any amount. All ranks call it.
    """
    if config.parallel.memory_limit:
        return config.parallel.memory_limit * 2**30
    least = torch.tensor([-_usable(device)], dtype=torch.float64, device=device)
    for group in (groups.tp, groups.dp, groups.pp):
        group.all_reduce(least, maximum=True)
    return -least.item()


def _usable(device: torch.device) -> float:
    """Memory of this rank's device that a plan may fill [bytes]."""
    if device.type != "cuda":
        return float("inf")
    return USABLE * torch.cuda.get_device_properties(device).total_memory


def choose_on_first_rank(
    config: Config, costs: ModelCosts, limit: float, groups: ParallelGroups, device: torch.device
) -> tuple[Choice, list[Choice]]:
    """The schedule that world rank 0 chooses, on all ranks, and there what it was chosen from.

    The other ranks do not plan, which takes a minute for the largest pipelines. All ranks call it.

    Args:
        config: resolved.
        costs: of the model's parts, the same on all ranks.
        limit: memory of a rank [bytes], the same on all ranks.
        groups, device: of this rank.

    Raises:
        ConfigError: on all ranks alike: no schedule fits.
    """
    choices: list[Choice] = []
    told = torch.zeros(5, dtype=torch.float64, device=device)
    possible = candidates(config)
    if groups.world_rank == 0:
        choices = [predict(each, costs, limit) for each in possible]
        chosen = best(choices)
        numbers = (chosen.step_time, chosen.bubble, chosen.memory, chosen.fits)
        told.copy_(torch.tensor([choices.index(chosen), *numbers], dtype=torch.float64))
    index, step_time, bubble, memory, fits = from_first_rank(told, groups).tolist()
    config = possible[int(index)]
    found = Choice(config, stage_costs(config, costs), step_time, bubble, memory, bool(fits))
    refuse_too_much(found, limit)
    return found, choices
