"""Rules about pipeline schedules and stages. One part of `megalite.check`; no torch import."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from os.path import isdir, isfile

from megalite.config import Config, ParallelConfig
from megalite.field_values import suggest
from megalite.pipeline.actions import Plan, PlanError
from megalite.pipeline.schedules import SCHEDULES
from megalite.run_plan import AUTO, checked_plan, is_file, least_chunks, num_stages, read_plan
from megalite.wording import counted

_MOST_TOLD = 5
"""Pairs of stages in one sentence."""


def schedule(config: Config) -> Iterator[str]:
    """The schedule exists and can have these chunks; a plan in a file is right and fits the run."""
    name = config.parallel.schedule
    if not is_file(name):
        yield from wrong_chunks(name, config.parallel.chunks)
        return
    missing = list(missing_file(name, (AUTO, *SCHEDULES)))
    yield from missing
    if missing:
        return
    try:
        plan = read_plan(name)
        misfits = [*_misfits(config, plan), *_misplaced(config, plan)]
        yield from misfits
        if not misfits:
            # It is as large as the run, so this takes no longer than a run's own plan.
            checked_plan(name)
    except PlanError as error:
        yield str(error)


def stages(config: Config) -> Iterator[str]:
    """Each stage owns at least one block, and `--pp-layers` has a number for each."""
    layers, parallel = config.model.num_layers, config.parallel
    split = parallel.pp_layers
    if any(wrong_chunks(parallel.schedule, parallel.chunks)):
        return
    try:
        count = num_stages(config)
    except PlanError:
        return  # told by the rule about schedules
    made = f"{_origin(parallel)} makes {counted(count, 'stage')}"
    if count > 2 * layers:
        yield (
            f"{made}, more than the {2 * layers} blocks of --num-layers {layers}: every stage owns "
            f"at least an attention or an MLP; try {_fewer_stages(config, count)}"
        )
    if split:
        given = f"--pp-layers {','.join(f'{number:.15g}' for number in split)}"
        is_open = parallel.schedule == AUTO and not parallel.chunks
        if is_open and len(split) % count:
            yield f"{given} names {counted(len(split), 'stage')}, no multiple of --pp {parallel.pp}"
        elif not is_open and len(split) != count:
            yield f"{given} names {counted(len(split), 'stage')}, but {made}"
        yield from _wrong_split(given, split, layers)


def _wrong_split(given: str, split: tuple[float, ...], layers: int) -> Iterator[str]:
    """What is wrong with the numbers themselves."""
    if any(number < 0.5 for number in split):
        yield f"{given}: every stage owns at least half a layer, 0.5"
    if any(2 * number % 1 for number in split):
        nearest = ",".join(f"{max(1, round(2 * number)) / 2:.15g}" for number in split)
        yield (
            f"{given}: a stage ends after a layer, or between its attention and its MLP; "
            f"try {nearest}"
        )
    elif sum(split) != layers:
        yield f"{given} adds up to {sum(split):.15g}, but --num-layers is {layers}"


def missing_file(name: str, schedules: Iterable[str]) -> Iterator[str]:
    """That the name is neither one of these schedules nor a file."""
    if isdir(name):
        known = ", ".join(schedules)
        yield f"--schedule {name} is a folder; give a file of actions, or one of {known}"
    elif not isfile(name):
        nearest = suggest(name.lower(), schedules, every=True)
        yield f"--schedule {name}: there is no such schedule or file{nearest}"


def wrong_chunks(name: str, chunks: int) -> Iterator[str]:
    """That the schedule of this name cannot have so many chunks; 0: its own number."""
    if is_file(name) or name == AUTO or not chunks:
        return
    least, most = SCHEDULES[name].chunks
    if chunks < least or (most and chunks > most):
        can = f"{'at least' if not most else 'always'} {counted(least, 'stage')} on each rank"
        able = [n for n, s in SCHEDULES.items() if s.chunks[0] <= chunks <= (s.chunks[1] or chunks)]
        yield (
            f"--chunks {chunks}: --schedule {name} has {can}; leave it out, or try --schedule "
            f"{' or '.join(able)}"
        )


def _misfits(config: Config, plan: Plan) -> Iterator[str]:
    """Where the plan in a file is not one of this run."""
    parallel, train = config.parallel, config.train
    given = f"--schedule {parallel.schedule}"
    if parallel.chunks:
        yield (
            f"--chunks {parallel.chunks} and {given}: the file says which stages a rank has; leave "
            "--chunks out"
        )
    if plan.num_ranks != parallel.pp:
        yield (
            f"{given} is for {counted(plan.num_ranks, 'rank')}, but --pp is {parallel.pp}; "
            f"give --pp {plan.num_ranks}"
        )
    unit, count = train.micro_batch_size * parallel.dp, plan.num_micro_batches
    if train.rampup_batch_size:
        yield (
            f"{given} is for {counted(count, 'micro-batch')}, but with --rampup-batch-size their "
            "number grows; leave it out"
        )
    elif train.global_batch_size % unit == 0 and count != config.num_micro_batches:
        yield (
            f"{given} is for {counted(count, 'micro-batch')}, but a step has "
            f"{config.num_micro_batches}; give --global-batch-size {count * unit} "
            f"(--micro-batch-size {train.micro_batch_size} x dp {parallel.dp} x {count})"
        )


def _misplaced(config: Config, plan: Plan) -> Iterator[str]:
    """Stages on ranks that are not connected; see `PipelineGroup.connect` and its groups."""
    given, last = f"--schedule {config.parallel.schedule}", plan.num_ranks - 1
    far = [
        f"stage {stage} on rank {here} and stage {stage + 1} on rank {there}"
        for stage, (here, there) in enumerate(pairwise(plan.stage_rank))
        if abs(here - there) > 1 and {here, there} != {0, last}
    ]
    if far:
        more = f", and {len(far) - _MOST_TOLD} more" if len(far) > _MOST_TOLD else ""
        yield (
            f"{given} has {', '.join(far[:_MOST_TOLD])}{more}: consecutive stages lie on the same "
            f"rank, on neighbouring ranks, or on the first and the last, 0 and {last}"
        )
    ends = (plan.stage_rank[0], plan.stage_rank[-1])
    if config.model.tie_embeddings and ends[0] != ends[1] and set(ends) != {0, last}:
        yield (
            f"--tie-embeddings and {given}: the first stage lies on rank {ends[0]}, the last on "
            f"rank {ends[1]}, but what they share is summed on ranks 0 and {last}; put them there, "
            "or both on one rank"
        )


def _origin(parallel: ParallelConfig) -> str:
    """What the number of stages comes from."""
    if is_file(parallel.schedule):
        return f"--schedule {parallel.schedule}"
    chunks = parallel.chunks or least_chunks(parallel.schedule)
    return f"--pp {parallel.pp}" + (f" x {chunks} chunks" if chunks > 1 else "")


def _fewer_stages(config: Config, count: int) -> str:
    """The nearest flags with which each stage owns a block."""
    parallel, blocks = config.parallel, 2 * config.model.num_layers
    if is_file(parallel.schedule):
        return f"--num-layers {-(-count // 2)} or more"
    least = least_chunks(parallel.schedule)
    chunks = parallel.chunks or least
    if chunks > least and blocks // parallel.pp >= least:
        return f"--chunks {blocks // parallel.pp} or fewer"
    with_chunks = f" with --chunks {least}" if chunks > least else ""
    return f"--pp {blocks // least} or fewer{with_chunks}"
