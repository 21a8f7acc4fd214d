"""Combinations that are known to go wrong or to slow everything down."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import torch

from megalite.diagnosis.row import SLOWER, WARNING, Row
from megalite.parallel.devices import usable_cores

LEAST_SHARED_MEMORY = 1 << 30
"""Of /dev/shm, through which NCCL's ranks of one machine meet; containers start with 64 MiB [B]."""

_SLOW_VARIABLES: Mapping[str, str] = MappingProxyType(
    {
        "CUDA_LAUNCH_BLOCKING": "the host waits for every kernel",
        "NCCL_P2P_DISABLE": "GPUs talk through the host's memory instead of NVLink",
        "NCCL_SHM_DISABLE": "ranks of one machine talk through the network",
        "NCCL_IB_DISABLE": "machines talk through TCP instead of InfiniBand",
        "TORCH_NCCL_BLOCKING_WAIT": "the host waits for every collective",
        "TORCH_DISTRIBUTED_DEBUG": "collectives are checked on the host, one by one",
    }
)


def known_bad(ranks: int) -> list[Row]:
    """A row for each that holds here.

    Args:
        ranks: on this machine.
    """
    return [row for rule in _RULES for row in rule(ranks)]


def _variables(_: int) -> Iterator[Row]:
    for name, effect in _SLOW_VARIABLES.items():
        value = os.environ.get(name, "0")
        if value not in ("", "0", "OFF", "INFO"):
            yield Row("environment", SLOWER, f"{name}={value}", effect, f"unset {name}")


def _threads(ranks: int) -> Iterator[Row]:
    asked, cores = os.environ.get("OMP_NUM_THREADS", ""), usable_cores()
    if asked.isdecimal() and int(asked) * ranks > max(cores, ranks):
        why = f"{ranks} ranks with {asked} threads each share {cores} cores"
        yield Row("environment", SLOWER, f"OMP_NUM_THREADS={asked}", why, "unset OMP_NUM_THREADS")


def _triton_for_torch(_: int) -> Iterator[Row]:
    """torch names the one Triton that it was tested with."""
    try:
        there = importlib.metadata.version("triton")
        needs = importlib.metadata.requires("torch") or []
    except importlib.metadata.PackageNotFoundError:
        return
    wanted = triton_wanted(needs)
    if wanted and wanted != there.split("+")[0]:
        why = f"torch {torch.__version__} was built for triton {wanted}"
        yield Row("triton", WARNING, there, why, f"pip install triton=={wanted}")


def triton_wanted(requirements: list[str]) -> str | None:
    """The version in torch's list of requirements: `triton==3.6.0; platform_system == "Linux"`."""
    for requirement in requirements:
        if found := re.match(r"triton==([\w.]+)", requirement):
            return found[1]
    return None


def _gpu_too_new(_: int) -> Iterator[Row]:
    if not torch.cuda.is_available():
        return
    built = torch.cuda.get_arch_list()
    major, minor = torch.cuda.get_device_capability()
    if built and not serves(built, major, minor):
        why = f"torch {torch.__version__} holds code for {', '.join(built)} only"
        yield Row("GPUs", WARNING, f"sm_{major}{minor}", why, "pip install --upgrade torch")


def serves(built: list[str], major: int, minor: int) -> bool:
    """Whether code built for these architectures runs on a GPU.

    Machine code (sm_80) runs on the same major version, portable code (compute_80) on later ones.
    """
    for name in built:
        found = re.match(r"(sm|compute)_(\d+)(\d)[a-z]?$", name)
        if found is None:
            continue
        its_major, its_minor = int(found[2]), int(found[3])
        if found[1] == "sm" and its_major == major and its_minor <= minor:
            return True
        if found[1] == "compute" and (its_major, its_minor) <= (major, minor):
            return True
    return False


def _shared_memory(ranks: int) -> Iterator[Row]:
    if ranks < 2 or not torch.cuda.is_available() or not os.path.isdir("/dev/shm"):
        return
    size = shutil.disk_usage("/dev/shm").total
    if size < LEAST_SHARED_MEMORY:
        why = "NCCL's ranks meet there, and fail or hang when it is full"
        text = f"/dev/shm holds {size / 2**20:.0f} MiB"
        yield Row("memory", WARNING, text, why, "docker run --ipc=host ...")


def _host_name(_: int) -> Iterator[Row]:
    """gloo listens where the host's own name points to."""
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = ""
    if not address or address.startswith("127."):
        points = f"points to {address}" if address else "has no address"
        why = f"the host's name {name} {points}: ranks on CPUs of other machines cannot reach it"
        yield Row(
            "gloo", WARNING, "this machine only", why, "export GLOO_SOCKET_IFNAME=<interface>"
        )


_RULES: tuple[Callable[[int], Iterator[Row]], ...] = (
    _variables,
    _threads,
    _triton_for_torch,
    _gpu_too_new,
    _shared_memory,
    _host_name,
)
