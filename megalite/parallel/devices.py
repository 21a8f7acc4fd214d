"""Which device each rank of this machine computes on, and with how many threads."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from megalite.config import Config
from megalite.errors import ConfigError
from megalite.parallel.machine import Machine
from megalite_kernels.backend import BackendError, fused_on


def own_machine(config: Config) -> Machine:
    """This machine, for ranks that `launch` will start on it."""
    gpus = torch.cuda.device_count()
    return Machine(0, config.world_size, min(gpus, config.world_size), 0 if gpus else None)


def choose_device(config: Config, machine: Machine) -> tuple[str, str]:
    """`cpu` or `cuda` for the ranks of this machine, and a phrase that says why.

    Raises:
        ConfigError: `--device cuda` with fewer GPUs than ranks.
    """
    asked, gpus, local_ranks = config.parallel.device, machine.gpus, machine.local_size
    ranks = f"{local_ranks} rank" + ("s" if local_ranks > 1 else "")
    found = f"{gpus} GPU{'' if gpus == 1 else 's'} for {ranks} on this machine"
    if asked == "cuda" and gpus < local_ranks:
        raise ConfigError(
            f"--device cuda: {found}, and each rank needs its own; use fewer ranks or --device cpu"
        )
    if asked == "cpu":
        return "cpu", f"CPU (gloo), as asked; {_cores(local_ranks)}"
    if gpus == local_ranks:
        back_end = "NCCL" if config.world_size > 1 else "one rank"
        return "cuda", f"{torch.cuda.get_device_name(machine.gpu)} ({back_end}): {found}"
    return "cpu", f"CPU (gloo): {found}; {_cores(local_ranks)}"


def require_kernels(device: str, precisions: Iterable[str], machine: Machine) -> None:
    """Make sure that what has to serve the operations between the matrix products can.

    Args:
        device: `cpu` or `cuda`, as chosen for the ranks of this machine.
        precisions: of the run; kernels serve all but fp64.
        machine: this one.

    Raises:
        ConfigError: they can't run here, with the remedies.
    """
    if set(precisions) == {"fp64"}:
        return
    try:
        fused_on(torch.device(device, machine.gpu or 0), torch.float32)
    except BackendError as error:
        raise ConfigError(str(error)) from None


def rank_device(config: Config, machine: Machine) -> torch.device:
    """The device of this rank, made current if it is a GPU."""
    if config.parallel.device != "cuda":
        return torch.device("cpu")
    assert machine.gpu is not None, "choose_device counted the GPUs"
    device = torch.device("cuda", machine.gpu)
    torch.cuda.set_device(device)
    if config.train.deterministic:
        be_deterministic()
    return device


def be_deterministic() -> None:
    """Let torch take kernels that add in a fixed order alone, or raise where it has none.

    Of this process, before its first matrix product: cuBLAS reads its workspace's size once.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # What is read is written before; filling memory with NaN first would show nothing, and cost.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def threads_of_a_rank(local_ranks: int) -> int:
    """Threads for each of the ranks of this machine."""
    return max(1, usable_cores() // local_ranks)


def usable_cores() -> int:
    """Cores that this process may use: those of its affinity, fewer under a container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, _quota(Path("/sys/fs/cgroup/cpu.max"))))


def _quota(file: Path) -> int:
    """Cores that a control group grants, from `<microseconds or max> <period>`; many if any."""
    try:
        granted, period = file.read_text(encoding="ascii").split()
        return -(-int(granted) // int(period))
    except (OSError, ValueError):
        return sys.maxsize


def _cores(local_ranks: int) -> str:
    cores = usable_cores()
    threads = os.environ.get("OMP_NUM_THREADS", str(threads_of_a_rank(local_ranks)))
    text = f"{cores} cores, {threads} thread" + ("s" if threads != "1" else "") + " a rank"
    if local_ranks > cores:
        text += " (more ranks than cores: slower than one rank, for learning)"
    return text
