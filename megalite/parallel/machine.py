"""Which ranks share this machine, and which GPU each of them takes.

Launchers say it in many ways or not at all: torchrun numbers the ranks of a machine, srun may hide
all GPUs but one from each task, a script may set RANK and WORLD_SIZE alone. So the ranks tell each
other their host and the GPUs they see, over the rendezvous store.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megalite.parallel.environment import World


@dataclass(frozen=True)
class Machine:
    """A rank's place on its machine.

    Attributes:
        local_rank, local_size: among the ranks of this machine.
        gpus: how many of these ranks can have a GPU of their own.
        gpu: index of this rank's among those it sees; None if none is left for it.
    """

    local_rank: int
    local_size: int
    gpus: int
    gpu: int | None


@dataclass(frozen=True)
class Seen:
    """What one rank sees.

    Attributes:
        machine: equal for the ranks of one machine.
        gpus: identity of each visible GPU, in order.
    """

    machine: str
    gpus: tuple[str, ...]


def find_machine(store: dist.Store, world: World) -> Machine:
    """This rank's place on its machine. All ranks call it."""
    seen = Seen(f"{socket.gethostname()}/{world.node}", visible_gpus())
    store.set(f"seen/{world.rank}", json.dumps([seen.machine, seen.gpus]))
    keys = [f"seen/{rank}" for rank in range(world.size)]
    store.wait(keys)
    told = map(json.loads, store.multi_get(keys))
    return place([Seen(machine, tuple(gpus)) for machine, gpus in told], world.rank)


def place(everyone: Sequence[Seen], rank: int) -> Machine:
    """Place of a rank, from what all ranks see.

    In order of their ranks, those of a machine take the first GPU they see that is still free: the
    first, second, ... if they see the same, the only one if each is shown its own.
    """
    neighbours = [r for r, seen in enumerate(everyone) if seen.machine == everyone[rank].machine]
    taken: dict[int, str] = {}
    for other in neighbours:
        free = [gpu for gpu in everyone[other].gpus if gpu not in taken.values()]
        if free:
            taken[other] = free[0]
    gpu = everyone[rank].gpus.index(taken[rank]) if rank in taken else None
    return Machine(neighbours.index(rank), len(neighbours), len(taken), gpu)


def free_host_bytes() -> int | None:
    """Memory of this machine that programs could still take [bytes]; None if it does not say.

    Linux's own estimate, with caches that it would give up.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kib = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if kib is None else 1024 * int(kib)


def visible_gpus() -> tuple[str, ...]:
    """Identity of each GPU that this process sees."""
    count = torch.cuda.device_count()
    return tuple(str(torch.cuda.get_device_properties(i).uuid) for i in range(count))
