"""Every planted fault is caught by `verify`, at the right tensor and under the right name."""

from __future__ import annotations

import pytest
import torch
from commands import run
from faults import FAULTS
from pool import RankPool
from worlds import world_groups

from megalite.config import Config
from megalite.verification.run import Verdict, verify
from megalite.verification.shrink import shrink


def verify_job(config: Config, fault: str | None) -> Verdict:
    groups = world_groups(config)
    with pytest.MonkeyPatch.context() as patch:
        if fault is not None:
            FAULTS[fault].plant(patch)
        return verify(config, groups, torch.device("cpu"), precisions=("fp64",))


def ranks(fault: str) -> int:
    return run(*FAULTS[fault].flags.split()).world_size


# Those of more than two ranks take half the time of all.
@pytest.mark.parametrize(
    "name", [pytest.param(f, marks=[pytest.mark.full] * (ranks(f) > 2)) for f in FAULTS]
)
def test_fault(pool: RankPool, name: str) -> None:
    fault = FAULTS[name]
    config = shrink(run(*fault.flags.split())).config
    verdict = pool.run(config.world_size, verify_job, config, name)[0].value
    failed = verdict.failed
    assert failed is not None, "it was not caught"
    failure = failed.failure
    if fault.kind == "missing":
        assert any(fault.name in name for name in failure.missing)
    else:
        assert (failure.first.kind, fault.name in failure.first.name) == (fault.kind, True), failure
    assert fault.cause in failure.cause, failure


RIGHT = sorted({fault.flags for fault in FAULTS.values()})


@pytest.mark.parametrize(
    "flags",
    [
        flags if turn % 4 == 0 else pytest.param(flags, marks=pytest.mark.full)
        for turn, flags in enumerate(RIGHT)
    ],
)
def test_no_alarm_without_a_fault(pool: RankPool, flags: str) -> None:
    config = shrink(run(*flags.split())).config
    verdict = pool.run(config.world_size, verify_job, config, None)[0].value
    assert verdict.failed is None, verdict.failed
