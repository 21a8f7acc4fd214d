"""Rules about memory: `--memory-limit`, and the host's with `--offload-optimizer`. One part of
`megalite.check`; no torch import."""

from __future__ import annotations

from collections.abc import Iterator

from megalite.config import Config
from megalite.estimate import fixed_bytes, rank_estimates
from megalite.pipeline.schedules import SCHEDULES
from megalite.planning.block_costs import estimated_costs, stage_costs
from megalite.planning.choice import choose_by_estimate, has_choice, without_choice
from megalite.run_plan import AUTO, run_plan
from megalite.wording import counted

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


def host_memory(config: Config, local_ranks: int, free: int | None) -> Iterator[str]:
    """A machine has what its ranks would pin.

    Args:
        config: of ranks on GPUs.
        local_ranks: of this machine.
        free: of its memory [bytes]; None: it does not say.
    """
    config = without_choice(config)
    if has_choice(config):
        config = choose_by_estimate(config).config
    needed = local_ranks * max(rank.host for rank in rank_estimates(config))
    if free is not None and needed > free:
        yield (
            f"--offload-optimizer: {counted(local_ranks, 'rank')} on this machine would pin "
            f"{needed / GIB:.1f} GiB of its memory, of which {free / GIB:.1f} GiB are free; give "
            "more --dp over more machines, or leave it out"
        )


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
