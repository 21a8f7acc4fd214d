"""The choice of --schedule auto at the start of a run, by costs measured on its own ranks."""

from __future__ import annotations

import torch

from megalite.config import Config
from megalite.data.loader import Loader
from megalite.data.samples import Samples
from megalite.layers.dtypes import weights_dtype
from megalite.parallel.groups import ParallelGroups
from megalite.pipeline.costs import Costs
from megalite.planning.choice import table
from megalite.planning.measure import measure_costs
from megalite.planning.shared import choose_on_first_rank, memory_limit


def choose_by_measuring(
    config: Config,
    groups: ParallelGroups,
    device: torch.device,
    samples: tuple[Samples, Samples, Samples | None],
) -> tuple[Config, Costs, str]:
    """The fastest schedule by costs measured here, the costs of its stages, and the comparison.

    World rank 0 compares and tells the others; their text is empty.
    """
    groups.activity.enter("measuring what the model's parts cost")
    loader = Loader(config, samples[0], samples[1], groups.dp, device)
    micro_batch = loader.train_batch(0).micro_batches[0]
    dtype = weights_dtype(config)
    costs = measure_costs(config, groups, device, dtype, micro_batch)
    limit = memory_limit(config, groups, device)
    groups.activity.enter("choosing a schedule on rank 0")
    best, choices = choose_on_first_rank(config, costs, limit, groups, device)
    if not choices:
        return best.config, best.costs, ""
    heading = "schedules by measured costs, forwards and backwards alone:\n"
    return best.config, best.costs, heading + table(choices, best, "ms", 1e3) + "\n\n"
