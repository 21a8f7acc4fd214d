"""The layouts, their runs, and which of them computes activations again. No torch import."""

from __future__ import annotations

from collections.abc import Iterator

from megalite import cli
from megalite.config import Config
from megalite.estimate import rank_estimates
from megalite.pipeline.lower import lower
from megalite.pipeline.simulate import simulate
from megalite.planning.block_costs import estimated_costs, stage_costs
from megalite.pretrain import PROGRAM
from megalite.program import checked
from megalite.run_plan import run_plan

FLAGSHIP = "--tp 4 --pp 2"
LAYOUTS = (
    FLAGSHIP,
    "--tp 8",
    "--dp 8 --zero 1",
    "--dp 8 --zero 3",
    "--tp 2 --pp 2 --dp 2",
    "--pp 8 --schedule 1f1b",
    "--pp 8 --schedule interleaved",
    "--pp 8 --schedule zb-v",
)
ALWAYS = "--eval-steps 0 --sample-length 0 --no-save-weights"
MICRO_BATCHES = 4
"""At least so many for each pipeline rank."""


def configuration(flags: str) -> Config:
    """A run, checked; its device is open.

    Raises:
        ConfigError: all that is wrong with the flags.
    """
    return checked(
        cli.parse(flags.split(), prog="", description="", switches=PROGRAM.switches), None
    )


def too_few_micro_batches(config: Config) -> Iterator[str]:
    """What is wrong with them."""
    least = MICRO_BATCHES * config.parallel.pp
    if config.parallel.pp > 1 and config.num_micro_batches < least:
        yield (
            f"--global-batch-size {config.train.global_batch_size}: {config.num_micro_batches} "
            f"micro-batches of {config.train.micro_batch_size} on {config.parallel.dp} data "
            f"ranks; {config.parallel.pp} pipeline ranks need {least} here"
        )


def peak_bytes(config: Config) -> int:
    """Predicted, of the rank that needs most."""
    return max(rank.total for rank in rank_estimates(config))


def fitted(config: Config, usable: float) -> Config:
    """The run, with its activations computed again in the backward if it would not fit else.

    Args:
        config: resolved.
        usable: memory of a GPU [bytes].
    """
    return config if peak_bytes(config) <= usable else config.replace(recompute="full")


def planned_bubble(config: Config) -> float:
    """Idle share of the ranks' time as planned, before anything is measured."""
    costs = stage_costs(config, estimated_costs(config))
    return simulate(lower(run_plan(config), costs), costs).bubble()
