"""torchrun's and srun's variables become a `World`; a garbled one is named; a batch script is
none."""

from __future__ import annotations

import re
from typing import Any

import pytest

from megalite.errors import ConfigError
from megalite.parallel.environment import World, detect_world, first_host

TORCHRUN = dict(
    RANK="5",
    WORLD_SIZE="8",
    LOCAL_RANK="1",
    LOCAL_WORLD_SIZE="4",
    GROUP_RANK="1",
    MASTER_ADDR="node7",
    MASTER_PORT="1234",
)
SRUN = dict(
    SLURM_JOB_ID="123456",
    SLURM_STEP_ID="2",
    SLURM_PROCID="5",
    SLURM_NTASKS="11",
    SLURM_STEP_NUM_TASKS="11",
    SLURM_LOCALID="1",
    SLURM_NODEID="1",
    SLURM_STEP_NODELIST="gpu[07-09]",
    SLURM_JOB_NODELIST="big[1-99]",
)
BATCH_SCRIPT = dict(
    SLURM_JOB_ID="123456",
    SLURM_PROCID="0",
    SLURM_NTASKS="8",
    SLURM_NPROCS="8",
    SLURM_LOCALID="0",
    SLURM_NODEID="0",
    SLURM_TASKS_PER_NODE="4(x2)",
    SLURM_JOB_NODELIST="gpu[07-08]",
)
OURS = dict(
    rank=5,
    size=8,
    node="1",
    master_addr="node7",
    master_port=1234,
    job="",
    launcher="torchrun",
)
SRUNS = dict(
    rank=5,
    size=11,
    node="1",
    master_addr="gpu07",
    master_port=20000 + 6601,
    job="123456.2",
    launcher="srun",
)


def changed(env: dict[str, str], **changes: str | None) -> dict[str, str]:
    """Without the variables that are set to None."""
    return {name: text for name, text in {**env, **changes}.items() if text is not None}


@pytest.mark.parametrize(
    ("changes", "different"),
    [
        ({}, {}),
        # As a hand-written loop sets them: the defaults of torch.
        (dict(LOCAL_RANK=None, LOCAL_WORLD_SIZE=None, GROUP_RANK=None), dict(node="")),
        (dict(MASTER_ADDR=None), dict(master_addr="127.0.0.1")),
        (dict(MASTER_PORT=None), dict(master_port=29500)),
        # torchrun inside a Slurm step: torchrun started this process.
        (SRUN, {}),
        (BATCH_SCRIPT, {}),
    ],
)
def test_torchrun(changes: dict[str, str | None], different: dict[str, Any]) -> None:
    assert detect_world(changed(TORCHRUN, **changes)) == World(**{**OURS, **different})


@pytest.mark.parametrize(
    ("changes", "different"),
    [
        ({}, {}),
        (dict(SLURM_PROCID="0"), dict(rank=0)),
        (dict(SLURM_NODEID="0"), dict(node="0")),
        (dict(SLURM_NODEID=None), dict(node="")),
        (dict(SLURM_STEP_NODELIST=None), dict(master_addr="big1")),
        (dict(SLURM_STEP_NODELIST=""), dict(master_addr="big1")),
        (dict(MASTER_ADDR="head"), dict(master_addr="head")),
        (dict(MASTER_PORT="77"), dict(master_port=77)),
        (
            dict(MASTER_ADDR="head", SLURM_STEP_NODELIST=None, SLURM_JOB_NODELIST=None),
            dict(master_addr="head"),
        ),
    ],
)
def test_srun(changes: dict[str, str | None], different: dict[str, Any]) -> None:
    assert detect_world(changed(SRUN, **changes)) == World(**{**SRUNS, **different})


def test_steps_that_run_side_by_side_meet_at_different_places() -> None:
    """`srun ... & srun ... &` in one job, and the same step of another job."""
    steps = [{}, dict(SLURM_STEP_ID="3"), dict(SLURM_JOB_ID="123457"), dict(SLURM_STEP_ID=None)]
    worlds = [detect_world(changed(SRUN, **step)) for step in steps]
    assert len({world.job for world in worlds}) == len(steps)
    assert len({world.master_port for world in worlds}) == len(steps)
    assert all(20000 <= world.master_port < 30000 for world in worlds)


@pytest.mark.parametrize(
    "env",
    [
        {},
        dict(PATH="/bin", MASTER_ADDR="node7", MASTER_PORT="1"),
        dict(LOCAL_RANK="1"),
        BATCH_SCRIPT,
        # salloc's shell, and a step of one task: one process, which starts its own ranks.
        dict(SLURM_JOB_ID="1", SLURM_NTASKS="8", SLURM_JOB_NODELIST="gpu[07-08]"),
        changed(SRUN, SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0"),
    ],
)
def test_nobody_started_us(env: dict[str, str]) -> None:
    assert detect_world(env) is None


@pytest.mark.parametrize("garbled", ["", "two", "1.5", "0x1"])
@pytest.mark.parametrize(
    ("env", "name"),
    [
        *((TORCHRUN, name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")),
        *((SRUN, name) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "MASTER_PORT")),
    ],
)
def test_a_garbled_number_is_named(env: dict[str, str], name: str, garbled: str) -> None:
    with pytest.raises(ConfigError, match=f"^megalite: {name}={garbled!r} is not a whole number$"):
        detect_world(changed(env, **{name: garbled}))


@pytest.mark.parametrize("rank", ["8", "-1"])
def test_a_rank_outside_its_world_is_refused(rank: str) -> None:
    with pytest.raises(ConfigError, match=f"torchrun gave rank {rank} of 8 ranks"):
        detect_world(changed(TORCHRUN, RANK=rank))


@pytest.mark.parametrize(
    ("env", "missing", "named"),
    [
        (SRUN, ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"], "SLURM_STEP_NODELIST names no host"),
        (TORCHRUN, ["WORLD_SIZE"], "WORLD_SIZE is not set"),
        (TORCHRUN, ["RANK"], "RANK is not set"),
    ],
)
def test_a_missing_variable_is_named(env: dict[str, str], missing: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        detect_world(changed(env, **dict.fromkeys(missing)))


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node.example.org,b", "node.example.org"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("gpu[12,07-09]", "gpu12"),
        ("gpu[007-123]", "gpu007"),
        ("gpu[5]", "gpu5"),
        ("a-[1-2]-x", "a-1-x"),
        ("a-[1-2]-x,b[3-4]", "a-1-x"),
        ("login1,gpu[07-09]", "login1"),
        ("rack[0-3]node[4-7]", "rack0node4"),  # Slurm knows up to two ranges
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.mark.parametrize("nodelist", ["", "[1-2]", ","])
def test_a_list_without_a_host_is_refused(nodelist: str) -> None:
    with pytest.raises(ConfigError, match="SLURM_STEP_NODELIST"):
        first_host(nodelist)
