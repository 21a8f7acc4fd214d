"""Each learning-rate schedule against its closed form: warm-up, middle, end and after."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from megalite.config import Config, TrainConfig, resolve
from megalite.optim.lr import learning_rate

STYLES = ("constant", "linear", "cosine", "WSD")
TRAIN = TrainConfig(
    steps=200,
    lr=1e-2,
    min_lr=1e-3,
    lr_warmup_steps=20,
    lr_decay_steps=120,
    lr_wsd_decay_steps=30,
    lr_wsd_decay_style="linear",
)


def rate(style: str, step: int, **values: object) -> float:
    return learning_rate(replace(TRAIN, lr_decay_style=style, **values), step)


def closed_form(style: str, step: int) -> float:
    """The schedule of `TRAIN` after warm-up."""
    done = min(1.0, (step - 20) / 100)
    share = {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": math.cos(math.pi * done / 2) ** 2,
        "WSD": max(0.0, min(1.0, (120 - step) / 30)),
    }[style]
    return 1e-3 + 9e-3 * share


@pytest.mark.parametrize("style", STYLES)
def test_closed_form_at_every_step(style: str) -> None:
    for step in range(20):
        assert rate(style, step) == pytest.approx(1e-2 * (step + 1) / 20, rel=1e-14)
    for step in range(20, 200):
        assert rate(style, step) == pytest.approx(closed_form(style, step), rel=1e-13)


@pytest.mark.parametrize(
    ("style", "step", "want"),
    [
        *((style, 0, 5e-4) for style in STYLES),
        *((style, 9, 5e-3) for style in STYLES),
        *((style, 19, 1e-2) for style in STYLES),
        *((style, 20, 1e-2) for style in STYLES),
        ("constant", 119, 1e-2),
        ("constant", 199, 1e-2),
        ("linear", 45, 1e-3 + 9e-3 * 0.75),
        ("linear", 70, 5.5e-3),
        ("linear", 119, 1e-3 + 9e-3 * 0.01),
        ("linear", 120, 1e-3),
        ("linear", 199, 1e-3),
        ("cosine", 45, 1e-3 + 9e-3 * (2 + math.sqrt(2)) / 4),
        ("cosine", 70, 5.5e-3),
        ("cosine", 95, 1e-3 + 9e-3 * (2 - math.sqrt(2)) / 4),
        ("cosine", 120, 1e-3),
        ("cosine", 199, 1e-3),
        ("WSD", 70, 1e-2),
        ("WSD", 90, 1e-2),
        ("WSD", 91, 1e-3 + 9e-3 * 29 / 30),
        ("WSD", 105, 5.5e-3),
        ("WSD", 119, 1e-3 + 9e-3 / 30),
        ("WSD", 120, 1e-3),
        ("WSD", 199, 1e-3),
    ],
)
def test_rates_by_hand(style: str, step: int, want: float) -> None:
    assert rate(style, step) == pytest.approx(want, rel=1e-13)


@pytest.mark.parametrize(
    ("decay", "want"),
    [
        ("linear", [1.0, 2 / 3, 0.5, 0.0]),
        ("cosine", [1.0, 0.75, 0.5, 0.0]),
        ("exponential", [1.0, 2 ** (2 / 3) - 1, 2**0.5 - 1, 0.0]),
        ("minus_sqrt", [1.0, 1 - 1 / math.sqrt(3), 1 - math.sqrt(0.5), 0.0]),
    ],
)
def test_shapes_of_the_final_decay(decay: str, want: list[float]) -> None:
    steps = (90, 100, 105, 120)
    rates = [rate("WSD", step, lr_wsd_decay_style=decay) for step in steps]
    assert rates == pytest.approx([1e-3 + 9e-3 * share for share in want], rel=1e-12)


@pytest.mark.parametrize("style", STYLES)
def test_without_warm_up_the_first_step_has_the_peak(style: str) -> None:
    assert rate(style, 0, lr_warmup_steps=0) == pytest.approx(1e-2, rel=1e-15)


@pytest.mark.parametrize("style", STYLES)
def test_rates_rise_to_the_peak_and_never_again(style: str) -> None:
    rates = [rate(style, step) for step in range(250)]
    assert max(rates) == pytest.approx(1e-2, rel=1e-15)
    assert all(a < b for a, b in pairwise(rates[:20]))
    assert all(a >= b * (1 - 1e-12) for a, b in pairwise(rates[19:]))
    assert min(rates[20:]) >= 1e-3 * (1 - 1e-12)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 120])
def test_resolved_schedules_of_any_length(style: str, steps: int) -> None:
    """Positive at every step, peak within the run, as `resolve` fills the lengths in."""
    train = resolve(Config().replace(steps=steps, lr=1.0, lr_decay_style=style)).train
    rates = [learning_rate(train, step) for step in range(steps)]
    assert max(rates) == 1.0
    assert min(rates) > 0.0
    warm_up = steps // 10
    assert rates[:warm_up] == [(step + 1) / warm_up for step in range(warm_up)]
    if style == "WSD":
        below = [step for step in range(warm_up, steps) if rates[step] < 1.0]
        assert below == list(range(steps - max(1, steps // 10) + 1, steps))
