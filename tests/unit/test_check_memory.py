"""`--memory-limit`: a plan that needs more is refused before start, with what would fit."""

from __future__ import annotations

import pytest
from commands import run, violations

from megalite.estimate import rank_estimates
from megalite.planning.choice import choose_by_estimate

BIG = ("--model", "llama3-8b", "--pp", "4", "--tp", "2", "--micro-batch-size", "1")
BATCH = ("--global-batch-size", "32", "--precision", "bf16")
GIB = 2**30


def needs(*flags: str) -> list[float]:
    return [each.total / GIB for each in rank_estimates(run(*BIG, *BATCH, *flags))]


def test_the_rank_and_what_would_fit_are_named() -> None:
    gpipe, least = needs("--schedule", "gpipe"), max(needs("--schedule", "v-min"))
    worst = gpipe.index(max(gpipe))
    limit = f"{least + 1:g}"
    (told,) = violations(*BIG, *BATCH, "--schedule", "gpipe", "--memory-limit", limit)
    needed = f"pipeline rank {worst} needs {max(gpipe):.3g} GiB under --schedule gpipe"
    assert told.startswith(f"--memory-limit {limit}: {needed}; try --schedule")
    assert "v-min (" in told
    assert "gpipe (" not in told


def test_what_fits_is_accepted() -> None:
    enough = max(needs("--schedule", "zb-v")) + 0.01
    run(*BIG, *BATCH, "--schedule", "zb-v", "--memory-limit", f"{enough}")
    run(*BIG, *BATCH, "--schedule", "auto", "--memory-limit", f"{enough}")


def test_weight_gradients_make_room_before_a_schedule_is_refused() -> None:
    """Without a limit v-min leaves more for later than it may under this one."""
    flags = (*BIG, *BATCH, "--schedule", "v-min")
    limit = max(needs("--schedule", "v-min")) - 1
    run(*flags, "--memory-limit", f"{limit}")
    (told,) = violations(*flags, "--memory-limit", f"{limit - 5}")
    least = float(told.split(" needs ")[1].split(" GiB")[0])
    assert limit - 5 < least < limit


@pytest.mark.parametrize("schedule", ["auto", "1f1b"])
def test_where_nothing_fits(schedule: str) -> None:
    (told,) = violations(*BIG, *BATCH, "--schedule", schedule, "--memory-limit", "5")
    assert "--recompute full" in told
    assert ("no schedule fits" in told) == (schedule == "auto")


def test_other_problems_come_first() -> None:
    told = violations(*BIG, *BATCH, "--pp-layers", "1,2", "--memory-limit", "5")
    assert told and not any("memory-limit" in sentence for sentence in told)


def test_auto_takes_the_fastest_that_fits() -> None:
    everything = choose_by_estimate(run(*BIG, *BATCH, "--schedule", "auto"))
    limit = f"{everything.memory / GIB - 2:g}"
    less = choose_by_estimate(run(*BIG, *BATCH, "--schedule", "auto", "--memory-limit", limit))
    assert everything.step_time < less.step_time
    assert less.memory / GIB <= float(limit) < everything.memory / GIB
