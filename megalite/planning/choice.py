"""`--schedule auto`: the schedule with the least predicted step time in the memory there is.

No torch import: costs come from the shape (`megalite.planning.block_costs`) or from measurements
(`megalite.planning.measure`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megalite.config import Config
from megalite.errors import ConfigError
from megalite.estimate import fixed_bytes
from megalite.pipeline.costs import Costs
from megalite.pipeline.lower import lower
from megalite.pipeline.schedules import SCHEDULES
from megalite.pipeline.simulate import simulate
from megalite.planning.block_costs import ModelCosts, estimated_costs, stage_costs
from megalite.run_plan import AUTO, num_stages, run_plan

MOST_CHUNKS = 4
"""Stages of a rank that are tried; each more halves the gain and adds messages."""

CLEARLY_FASTER = 0.995
"""A schedule that takes more than this share of another's time is as fast."""


@dataclass(frozen=True)
class Choice:
    """One schedule for a run.

    Attributes:
        config: of the run, with the schedule and its chunks.
        costs: of its stages.
        step_time: predicted, of forwards and backwards, in the costs' unit.
        bubble: idle share of the ranks' time.
        memory: predicted of the rank that needs most [bytes].
        fits: within the limit.
    """

    config: Config
    costs: Costs
    step_time: float
    bubble: float
    memory: float
    fits: bool


def predictions(config: Config, costs: ModelCosts, limit: float) -> list[Choice]:
    """Every schedule that the run could follow.

    Args:
        config: resolved, its precision too; its own schedule does not matter.
        costs: of the model's parts.
        limit: memory of a rank [bytes].
    """
    return [predict(candidate, costs, limit) for candidate in candidates(config)]


def has_choice(config: Config) -> bool:
    """Whether `--schedule auto` asks for a choice: one stage follows the same plan under all."""
    return config.parallel.schedule == AUTO and num_stages(config) > 1


def without_choice(config: Config) -> Config:
    """The run as it is where nothing is to be chosen: `auto` on one stage is 1f1b."""
    is_open = config.parallel.schedule == AUTO and not has_choice(config)
    return config.replace(schedule="1f1b", chunks=1) if is_open else config


def choose_by_estimate(config: Config) -> Choice:
    """The schedule that the shape alone speaks for, within `--memory-limit`."""
    if config.train.precision == "auto":
        config = config.replace(precision="bf16")
    limit = config.parallel.memory_limit * 2**30 or float("inf")
    return choose(predictions(config, estimated_costs(config), limit), limit)


def choose(choices: Sequence[Choice], limit: float) -> Choice:
    """The best of them.

    Raises:
        ConfigError: none fits.
    """
    chosen = best(choices)
    refuse_too_much(chosen, limit)
    return chosen


def refuse_too_much(chosen: Choice, limit: float) -> None:
    """Raise ConfigError unless the best choice fits."""
    if not chosen.fits:
        raise ConfigError(
            f"--schedule auto: no schedule fits {limit / 2**30:.3g} GiB; "
            f"{chosen.config.parallel.schedule} needs least, {chosen.memory / 2**30:.3g} GiB: give "
            "--recompute full, a smaller --micro-batch-size, or more ranks"
        )


def best(choices: Sequence[Choice]) -> Choice:
    """The fastest that fits; of those within half a percent of it the one that needs least memory.

    If none fits, the one that needs least.
    """
    fitting = [choice for choice in choices if choice.fits]
    if not fitting:
        return min(choices, key=lambda choice: choice.memory)
    fastest = min(choice.step_time for choice in fitting)
    as_fast = [choice for choice in fitting if CLEARLY_FASTER * choice.step_time <= fastest]
    return min(as_fast, key=lambda choice: choice.memory)


def table(choices: Sequence[Choice], chosen: Choice, unit: str, scale: float) -> str:
    """All of them side by side, fastest first; times are shown in `unit`, `scale` x the costs'."""
    lines = [f"  {'schedule':<14s}{'chunks':>6s}  {'step [' + unit + ']':>12s}  idle   memory"]
    for choice in sorted(choices, key=lambda choice: choice.step_time):
        parallel = choice.config.parallel
        note = "" if choice.fits else "  does not fit"
        lines.append(
            f"  {parallel.schedule:<14s}{parallel.chunks:>6d}  {scale * choice.step_time:>12.4g}"
            f"  {100 * choice.bubble:4.1f}%  {choice.memory / 2**30:.3g} GiB"
            + ("  chosen" if choice == chosen else note)
        )
    return "\n".join(lines)


def candidates(config: Config) -> list[Config]:
    """The run under every schedule that it could follow."""
    return list(_candidates(config))


def _candidates(config: Config) -> Iterator[Config]:
    """The run under every schedule, those of whole backwards and few chunks first."""
    stages = 2 * config.model.num_layers
    for name, schedule in SCHEDULES.items():
        default, most = schedule.chunks
        for chunks in range(default, (most or MOST_CHUNKS) + 1):
            candidate = config.replace(schedule=name, chunks=chunks)
            split = config.parallel.pp_layers
            if config.parallel.chunks not in (0, chunks):
                continue
            if split and len(split) != config.parallel.pp * chunks:
                continue
            is_1f1b_again = name == "1f1b" and chunks > 1
            if config.parallel.pp * chunks <= stages and not is_1f1b_again:
                yield candidate


def predict(config: Config, of_parts: ModelCosts, limit: float) -> Choice:
    """What one schedule would take, with weight gradients placed under the limit [bytes]."""
    costs = stage_costs(config, of_parts)
    fixed = fixed_bytes(config)
    plan = run_plan(config, costs=costs, limit=limit - max(fixed))
    timeline = simulate(lower(plan, costs), costs)
    memory = max(each + costs.peak(order) for each, order in zip(fixed, plan.ranks, strict=True))
    return Choice(config, costs, timeline.makespan, timeline.bubble(), memory, memory <= limit)
