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
    MASTER_ADDR="node7",
    MASTER_PORT="1234",
)
SRUN = dict(
    SLURM_JOB_ID="123456",
    SLURM_PROCID="5",
    SLURM_NTASKS="11",
    SLURM_STEP_NUM_TASKS="11",
    SLURM_LOCALID="1",
    SLURM_NODEID="1",
    SLURM_STEP_TASKS_PER_NODE="4(x2),3",
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
    local_rank=1,
    local_size=4,
    master_addr="node7",
    master_port=1234,
    launcher="torchrun",
)
SRUNS = dict(
    rank=5,
    size=11,
    local_rank=1,
    local_size=4,
    master_addr="gpu07",
    master_port=23456,
    launcher="srun",
)


def changed(env: dict[str, str], **changes: str | None) -> dict[str, str]:
    """Without the variables that are set to None."""
    return {name: text for name, text in {**env, **changes}.items() if text is not None}


@pytest.mark.parametrize(
    ("changes", "different"),
    [
        ({}, {}),
        # As a hand-written loop sets them: one machine, the defaults of torch.
        (dict(LOCAL_RANK=None), dict(local_rank=1)),
        (dict(LOCAL_WORLD_SIZE=None), dict(local_size=8)),
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
        (dict(SLURM_NODEID="0"), dict(local_size=4)),
        (dict(SLURM_NODEID="2"), dict(local_size=3)),
        (dict(SLURM_NODEID="2", SLURM_STEP_TASKS_PER_NODE="5,4,2"), dict(local_size=2)),
        (dict(SLURM_NODEID="1", SLURM_STEP_TASKS_PER_NODE="5,3(x3)"), dict(local_size=3)),
        (dict(SLURM_NODEID="0", SLURM_STEP_TASKS_PER_NODE="11"), dict(local_size=11)),
        (dict(SLURM_NODEID=None, SLURM_STEP_TASKS_PER_NODE="11"), dict(local_size=11)),
        (dict(SLURM_STEP_NODELIST=None), dict(master_addr="big1")),
        (dict(SLURM_STEP_NODELIST=""), dict(master_addr="big1")),
        (dict(MASTER_ADDR="head"), dict(master_addr="head")),
        (dict(MASTER_PORT="77"), dict(master_port=77)),
        (
            dict(MASTER_ADDR="head", SLURM_STEP_NODELIST=None, SLURM_JOB_NODELIST=None),
            dict(master_addr="head"),
        ),
        (dict(SLURM_JOB_ID="9"), dict(master_port=20009)),
        (dict(SLURM_JOB_ID="40000"), dict(master_port=20000)),
    ],
)
def test_srun(changes: dict[str, str | None], different: dict[str, Any]) -> None:
    assert detect_world(changed(SRUN, **changes)) == World(**{**SRUNS, **different})


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
        *((TORCHRUN, name) for name in TORCHRUN if name != "MASTER_ADDR"),
        *((SRUN, f"SLURM_{x}") for x in ("PROCID", "LOCALID", "NODEID", "STEP_NUM_TASKS")),
        *((SRUN, name) for name in ("SLURM_JOB_ID", "MASTER_PORT")),
    ],
)
def test_a_garbled_number_is_named(env: dict[str, str], name: str, garbled: str) -> None:
    with pytest.raises(ConfigError, match=f"^megalite: {name}={garbled!r} is not a whole number$"):
        detect_world(changed(env, **{name: garbled}))


@pytest.mark.parametrize("garbled", ["", "4(x2", "four", "4(x2);3", "4-3"])
def test_garbled_tasks_per_node_are_named(garbled: str) -> None:
    """Taken for one task, the device is chosen as if this rank had the machine to itself."""
    with pytest.raises(ConfigError, match="SLURM_STEP_TASKS_PER_NODE"):
        detect_world(changed(SRUN, SLURM_STEP_TASKS_PER_NODE=garbled))


@pytest.mark.parametrize(
    ("env", "missing", "named"),
    [
        (SRUN, ["SLURM_LOCALID"], "SLURM_LOCALID is not set"),
        (SRUN, ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"], "SLURM_STEP_NODELIST names no host"),
        (SRUN, ["SLURM_STEP_TASKS_PER_NODE"], "SLURM_STEP_TASKS_PER_NODE is not set"),
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
