"""Who started us: nobody, torchrun or srun, and what else environment variables ask for.

No torch import.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from zlib import crc32

from megalite.errors import ConfigError

KERNEL_BACK_ENDS = ("auto", "triton", "torch")
"""Values of MEGALITE_KERNELS, which `megalite_kernels` reads; naming them there takes torch."""


@dataclass(frozen=True)
class World:
    """This process's place among the ranks that a launcher started.

    Attributes:
        rank, size: world rank and number of ranks.
        node: the launcher's name for this machine; ranks of one host and node share its GPUs.
        master_addr, master_port: where rank 0 (or the launcher) keeps the rendezvous store.
        job: names this set of ranks, if others may meet at the same address.
        launcher: "torchrun" or "srun", for messages.
        attempt: how often the launcher has started these ranks again.
    """

    rank: int
    size: int
    node: str
    master_addr: str
    master_port: int
    job: str
    launcher: str
    attempt: int = 0


def detect_world(env: Mapping[str, str]) -> World | None:
    """The world that torchrun or srun describes in `env`, or None if we start the ranks.

    torchrun sets RANK and WORLD_SIZE, and so do people by hand. Inside a job step srun sets
    SLURM_STEP_NUM_TASKS; the script of a batch job has SLURM_NTASKS and SLURM_PROCID too, but is
    one process and starts its own.

    Raises:
        ConfigError: a variable is missing or not a number.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        return _checked(
            World(
                rank=_number(env, "RANK"),
                size=_number(env, "WORLD_SIZE"),
                node=env.get("GROUP_RANK", ""),
                master_addr=env.get("MASTER_ADDR", "127.0.0.1"),
                master_port=_number(env, "MASTER_PORT", 29500),
                job="",
                launcher="torchrun",
                attempt=_number(env, "TORCHELASTIC_RESTART_COUNT", 0),
            )
        )
    if "SLURM_PROCID" in env and _number(env, "SLURM_STEP_NUM_TASKS", 1) > 1:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
        # Steps of one job may run side by side on the same hosts.
        job = f"{env.get('SLURM_JOB_ID', '0')}.{env.get('SLURM_STEP_ID', '0')}"
        return _checked(
            World(
                rank=_number(env, "SLURM_PROCID"),
                size=_number(env, "SLURM_STEP_NUM_TASKS"),
                node=env.get("SLURM_NODEID", ""),
                master_addr=env.get("MASTER_ADDR") or first_host(nodes),
                # Outside the usual ephemeral range of Linux (32768-60999).
                master_port=_number(env, "MASTER_PORT", 20000 + crc32(job.encode()) % 10000),
                job=job,
                launcher="srun",
                attempt=_number(env, "SLURM_RESTART_COUNT", 0),
            )
        )
    return None


def wrong_variables(env: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with the variables that are not about ranks; an empty one counts as unset."""
    asked = env.get("MEGALITE_KERNELS")
    if asked and asked not in KERNEL_BACK_ENDS:
        choices = ", ".join(KERNEL_BACK_ENDS)
        yield f"MEGALITE_KERNELS={asked} is not a back end of the kernels; choose one of {choices}"


def _checked(world: World) -> World:
    if not 0 <= world.rank < world.size:
        raise ConfigError(f"{world.launcher} gave rank {world.rank} of {world.size} ranks")
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
