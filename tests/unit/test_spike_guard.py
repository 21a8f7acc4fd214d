"""What is a spike and what is not, step by step, against the definition's arithmetic."""

from __future__ import annotations

import math
import random

import pytest
import torch
from commands import run, violations

from megalite.optim.spikes import SpikeGuard
from megalite.verification.defined_rules import DefinedSpikes

CPU = torch.device("cpu")
Figures = tuple[float, float]


def judged(figures: list[Figures], deviations: float = 3.0, window: int = 4) -> list[bool]:
    guard = SpikeGuard(deviations, window, CPU)
    return [bool(guard.judge(torch.tensor(f, dtype=torch.float64))) for f in figures]


EVEN = [(1.0, 5.0), (1.2, 5.2), (0.8, 4.8), (1.0, 5.0)]


@pytest.mark.parametrize(
    ("figures", "is_spike"),
    [
        ((1.0, 5.0), False),
        ((1.4, 5.0), False),  # 3 deviations of 0.141 above 1 are 1.424
        ((1.45, 5.0), True),
        ((1.0, 5.4), False),
        ((1.0, 5.45), True),
        ((9.0, 9.0), True),
        ((0.0, 0.0), False),  # below the mean
        ((math.inf, 5.0), False),  # told apart: a gradient that is not finite
        ((1.0, math.nan), False),
    ],
)
def test_either_figure_may_stand_out(figures: Figures, is_spike: bool) -> None:
    assert judged([*EVEN, figures]) == [False] * 4 + [is_spike]


def test_until_the_window_is_full_nothing_is_a_spike() -> None:
    assert judged([(1.0, 1.0), (1.0, 1.0), (1.0, 1.0), (1e9, 1e9)]) == [False] * 4
    assert judged([(1.0, 1.0), (1.1, 1.0), (1e9, 1e9)], window=2) == [False, False, True]


def test_steps_that_are_not_finite_are_not_remembered() -> None:
    holes = [(math.inf, 5.0), (1.0, math.nan)]
    found = judged([*EVEN[:2], *holes, *EVEN[2:], *holes, (1.4, 5.0), (2.0, 5.0)])
    assert found == [False] * 9 + [True]


def test_only_the_last_steps_count() -> None:
    early = [(100.0, 100.0), (1.0, 1.0)] * 2
    assert judged([*early, (5.0, 5.0)]) == [False] * 5, "within what is remembered"
    assert judged([*early, *EVEN, (5.0, 5.0)])[-1], "which is forgotten"


@pytest.mark.parametrize(("deviations", "window"), [(6.0, 128), (3.0, 32)])
def test_a_lasting_rise_is_taken_after_some_steps(deviations: float, window: int) -> None:
    generator = random.Random(1)

    def near(level: float) -> list[Figures]:
        return [(1.0, level + 1e-3 * generator.random()) for _ in range(window)]

    found = judged([*near(2.0), *near(3.0)], deviations, window)
    skipped = sum(found)
    assert found == [False] * window + [True] * skipped + [False] * (window - skipped)
    assert 1 <= skipped <= 1.5 * window / deviations**2


@pytest.mark.parametrize("seed", range(4))
def test_it_follows_the_definition(seed: int) -> None:
    config = run("--skip-spikes", "1.5", "--spike-window", "5", "--steps", "99")
    guard, defined = SpikeGuard(1.5, 5, CPU), DefinedSpikes(config)
    generator = random.Random(seed)
    steps = [(generator.lognormvariate(0, 1), generator.gauss(5, 1)) for _ in range(60)]
    found = [bool(guard.judge(torch.tensor(f, dtype=torch.float64))) for f in steps]
    assert found == [defined.stands_out(*figures) for figures in steps]
    assert 3 < sum(found) < 40


def test_nothing_of_it_is_read_by_the_host() -> None:
    """On the meta device there is nothing to read."""
    guard = SpikeGuard(6.0, 8, torch.device("meta"))
    assert guard.judge(torch.zeros(2, dtype=torch.float64, device="meta")).device.type == "meta"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--skip-spikes -1", "--skip-spikes -1.0 must not be negative"),
        ("--skip-spikes inf", "--skip-spikes inf is too large"),
        ("--skip-spikes 6 --spike-window 1", "--spike-window 1 must be at least 2"),
        ("--skip-spikes 6 --spike-window 50 --steps 50", "is not below the 50 steps of the run"),
        ("--skip-spikes 6 --steps 100", "--spike-window 128 is not below the 100 steps"),
        ("--spike-window 9", "--spike-window 9 has no effect without --skip-spikes"),
    ],
)
def test_what_is_refused(flags: str, told: str) -> None:
    (found,) = violations(*flags.split())
    assert told in found
