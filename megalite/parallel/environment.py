"""Who started us: nobody, torchrun or srun, read from environment variables. No torch import."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megalite.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process's place among the ranks that a launcher started.

    Attributes:
        rank, size: world rank and number of ranks.
        local_rank, local_size: the same on this machine.
        master_addr, master_port: where rank 0 (or the launcher) keeps the rendezvous store.
        launcher: "torchrun" or "srun", for messages.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    master_addr: str
    master_port: int
    launcher: str


def detect_world(env: Mapping[str, str]) -> World | None:
    """The world that torchrun or srun describes in `env`, or None if we start the ranks.

    torchrun sets RANK and WORLD_SIZE. Inside a job step srun sets SLURM_STEP_NUM_TASKS; the script
    of a batch job has SLURM_NTASKS and SLURM_PROCID too, but is one process and starts its own.

    Raises:
        ConfigError: a variable is missing or not a number.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
        local_size = _number(env, "LOCAL_WORLD_SIZE", size)
        return _checked(
            World(
                rank=rank,
                size=size,
                local_rank=_number(env, "LOCAL_RANK", rank % max(1, local_size)),
                local_size=local_size,
                master_addr=env.get("MASTER_ADDR", "127.0.0.1"),
                master_port=_number(env, "MASTER_PORT", 29500),
                launcher="torchrun",
            )
        )
    if "SLURM_PROCID" in env and _number(env, "SLURM_STEP_NUM_TASKS", 1) > 1:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
        return _checked(
            World(
                rank=_number(env, "SLURM_PROCID"),
                size=_number(env, "SLURM_STEP_NUM_TASKS"),
                local_rank=_number(env, "SLURM_LOCALID"),
                local_size=_tasks_of_node(env, _number(env, "SLURM_NODEID", 0)),
                master_addr=env.get("MASTER_ADDR") or first_host(nodes),
                # One port per job, outside the usual ephemeral range of Linux (32768-60999).
                master_port=_number(
                    env, "MASTER_PORT", 20000 + _number(env, "SLURM_JOB_ID", 0) % 10000
                ),
                launcher="srun",
            )
        )
    return None


def _checked(world: World) -> World:
    if not 0 <= world.rank < world.size:
        raise ConfigError(f"{world.launcher} gave rank {world.rank} of {world.size} ranks")
    if not 0 <= world.local_rank < world.local_size:
        raise ConfigError(
            f"{world.launcher} gave local rank {world.local_rank} of {world.local_size} ranks here"
        )
    return world


def first_host(nodelist: str) -> str:
    """First host of a Slurm node list: `gpu[07-09,12],login1` -> `gpu07`.

    Raises:
        ConfigError: the list is empty.
    """
    first = re.match(r"[^\[\],](?:[^\[\],]|\[[^\]]*\])*", nodelist)
    if not first:
        raise ConfigError(
            "SLURM_STEP_NODELIST names no host: set MASTER_ADDR to the host of rank 0"
        )
    # Of each range its first number.
    return re.sub(r"\[([0-9]+)[^\]]*\]", r"\1", first[0])


def _tasks_of_node(env: Mapping[str, str], node: int) -> int:
    """Tasks on one node from Slurm's compressed list: `4(x2),3` -> 4, 4, 3."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    if name not in env:
        raise ConfigError(f"{name} is not set, though the launcher's other variables are")
    counts: list[int] = []
    for part in env[name].split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise ConfigError(f"{name}={env[name]!r} is not a list such as 4(x2),3")
        counts += [int(match[1])] * int(match[2] or 1)
    if node >= len(counts):
        raise ConfigError(f"{name}={env[name]!r} has no node {node}, which SLURM_NODEID names")
    return counts[node]


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None:
        if default is None:
            raise ConfigError(f"{name} is not set, though the launcher's other variables are")
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r} is not a whole number") from None
