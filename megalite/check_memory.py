"""The rule about `--memory-limit`. One part of `megalite.check`; no torch import."""

from __future__ import annotations

from collections.abc import Iterator

from megalite.config import Config
from megalite.estimate import fixed_bytes
from megalite.pipeline.schedules import SCHEDULES
from megalite.planning.block_costs import estimated_costs, stage_costs
from megalite.run_plan import AUTO, run_plan

GIB = 2**30


def memory(config: Config) -> Iterator[str]:
    """The plan fits, or for `--schedule auto` that of some schedule."""
    limit, name = config.parallel.memory_limit, config.parallel.schedule
    if not limit:
        return
    if config.train.precision == "auto":
        config = config.replace(precision="bf16")
    needs = [] if name == AUTO else _needs(config)
    if needs and max(needs) <= limit:
        return
    others = {other: _most(config, other) for other in SCHEDULES}
    able = {other: most for other, most in others.items() if most is not None}
    fitting = [f"{other} ({most:.3g} GiB)" for other, most in able.items() if most <= limit]
    if name == AUTO:
        if fitting:
            return
        least = min(able, key=lambda other: able[other])
        what = f"no schedule fits; {least} needs least, {able[least]:.3g} GiB"
    else:
        worst = needs.index(max(needs))
        what = f"pipeline rank {worst} needs {needs[worst]:.3g} GiB under --schedule {name}"
    remedies = "--recompute full, a smaller --micro-batch-size, or more ranks"
    hint = f"--schedule {' or '.join(fitting)}" if fitting else remedies
    yield f"--memory-limit {limit:g}: {what}; try {hint}"


def _needs(config: Config) -> list[float]:
    """What the ranks at each place of the pipeline need [GiB].

    Weight gradients are placed under the limit, by the costs that the first step plans by.
    """
    costs, fixed = stage_costs(config, estimated_costs(config)), fixed_bytes(config)
    limit = config.parallel.memory_limit * GIB - max(fixed)
    plan = run_plan(config, costs=costs, limit=limit)
    peaks = [costs.peak(order) for order in plan.ranks]
    return [(each + peak) / GIB for each, peak in zip(fixed, peaks, strict=True)]


def _most(config: Config, schedule: str) -> float | None:
    """What a rank needs at most under a schedule [GiB]; None if the run cannot follow it."""
    parallel = config.parallel
    chunks = SCHEDULES[schedule].chunks[0]
    fits_split = not parallel.pp_layers or len(parallel.pp_layers) == parallel.pp * chunks
    if parallel.pp * chunks > 2 * config.model.num_layers or not fits_split:
        return None
    return max(_needs(config.replace(schedule=schedule, chunks=chunks)))
