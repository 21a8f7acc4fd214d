"""The loss scale equals its definition, a loop of plain Python, over random overflows."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import pytest
import torch

from megalite.config import Config
from megalite.config_scaling import ScalingConfig
from megalite.optim.scaler import LARGEST, DynamicLossScale, LossScale, make_loss_scale

CPU = torch.device("cpu")
SEED = 20261130


@dataclass
class Defined:
    """Megatron-LM's `DynamicGradScaler`, to the upper limit; overflows in, scales out."""

    scaling: ScalingConfig
    scale: float = field(init=False)
    growth_tracker: int = 0
    hysteresis_tracker: int = field(init=False)

    def __post_init__(self) -> None:
        self.scale = self.scaling.initial_loss_scale
        self.hysteresis_tracker = self.scaling.hysteresis

    def update(self, found_inf: bool) -> None:
        if found_inf:
            self.growth_tracker = 0
            self.hysteresis_tracker -= 1
            if self.hysteresis_tracker <= 0:
                self.scale = max(self.scale * 0.5, self.scaling.min_loss_scale)
            return
        self.growth_tracker += 1
        if self.growth_tracker == self.scaling.loss_scale_window:
            self.growth_tracker = 0
            self.hysteresis_tracker = self.scaling.hysteresis
            if self.scale * 2 <= 2**24:
                self.scale *= 2


def follows(scaling: ScalingConfig, overflows: list[bool]) -> set[float]:
    """The scales on the way, which are those of the definition."""
    ours, theirs, seen = DynamicLossScale(scaling, CPU), Defined(scaling), {0.0}
    for step, overflow in enumerate(overflows):
        ours.update(torch.tensor(float(overflow)))
        theirs.update(overflow)
        assert ours.value.item() == theirs.scale, (scaling, step)
        seen.add(theirs.scale)
    return seen - {0.0}


def test_a_thousand_random_sequences() -> None:
    generator = random.Random(SEED)
    ends = {"grew": 0, "fell": 0, "least": 0, "largest": 0}
    for _ in range(1000):
        least = 2.0 ** generator.randint(-4, 8)
        initial = least * 2.0 ** generator.randint(0, 20)
        window, hysteresis = generator.randint(1, 5), generator.randint(1, 4)
        scaling = ScalingConfig(0.0, initial, least, window, hysteresis)
        often = generator.choice([0.0, 0.1, 0.3, 0.7, 1.0])
        seen = follows(scaling, [generator.random() < often for _ in range(60)])
        ends["grew"] += max(seen) > initial
        ends["fell"] += min(seen) < initial
        ends["least"] += min(seen) == least < initial
        ends["largest"] += max(seen) == LARGEST > initial
    assert min(ends.values()) > 20, f"every part of the definition has been reached: {ends}"


def test_its_own_words() -> None:
    """Two good steps in a row double; the first overflow since is borne, the next ones halve."""
    scale = DynamicLossScale(ScalingConfig(0.0, 8.0, 1.0, 2, 2), CPU)
    seen = []
    for overflow in (0, 0, 1, 0, 1, 1, 0, 1, 0, 0, 1, 1):
        scale.update(torch.tensor(float(overflow)))
        seen.append(scale.value.item())
    assert seen == [8, 16, 16, 16, 8, 4, 4, 2, 2, 4, 4, 2]


def test_a_start_beyond_the_largest_is_kept_until_it_overflows() -> None:
    scale = DynamicLossScale(ScalingConfig(0.0, 2.0**32, 1.0, 1, 1), CPU)
    seen = []
    for overflow in (0, 1, 0, *[1] * 7, 0, 0):
        scale.update(torch.tensor(float(overflow)))
        seen.append(math.log2(scale.value.item()))
    assert seen == [32, 31, 31, 30, 29, 28, 27, 26, 25, 24, 24, 24]


@pytest.mark.parametrize(
    ("values", "kind", "first"),
    [
        (dict(precision="fp16"), DynamicLossScale, 65536),
        (dict(precision="fp16", initial_loss_scale=32.0), DynamicLossScale, 32),
        (dict(precision="fp16", loss_scale=3.0), LossScale, 3),
        *((dict(precision=name), LossScale, 1) for name in ("bf16", "fp32", "fp64")),
    ],
)
def test_which_scale_a_run_has(values: dict, kind: type[LossScale], first: float) -> None:
    scale = make_loss_scale(Config().replace(**values), CPU)
    assert type(scale) is kind and scale.value.item() == first
    assert scale.value.dtype == torch.float32 and scale.value.shape == ()
    for _ in range(5):
        scale.update(torch.tensor(1.0))
    assert (scale.value.item() == first) == (kind is LossScale)


def test_the_host_reads_nothing() -> None:
    """On the device `meta` there are no values to read."""
    scale = DynamicLossScale(ScalingConfig(), torch.device("meta"))
    scale.update(torch.zeros((), device="meta"))
    assert scale.value.device.type == "meta"
