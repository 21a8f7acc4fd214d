"""Jobs that go wrong, run by `python jobs.py NAME` on four ranks, our own or torchrun's."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

from megalite.config import Config, resolve, resolve_device
from megalite.parallel.environment import detect_world
from megalite.parallel.launch import Prepared, Rank, join, launch, leave
from megalite.program import end


def _wait_for_all(rank: Rank) -> int:
    while True:
        rank.groups.tp.all_reduce(torch.ones(1))
        rank.groups.pp.all_reduce(torch.ones(1))


def fails(rank: Rank) -> int:
    """Rank 2 raises while the others are in a collective."""
    if rank.groups.world_rank == 2:
        time.sleep(0.5)
        raise ZeroDivisionError("planted on rank 2")
    return _wait_for_all(rank)


def killed(rank: Rank) -> int:
    """Rank 1 is killed while the others are in a collective."""
    if rank.groups.world_rank == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    return _wait_for_all(rank)


def waits(rank: Rank) -> int:
    """All ranks say who they are and wait in collectives until somebody stops them."""
    print(f"pid {os.getpid()}", flush=True)
    return _wait_for_all(rank)


def leaves_early(rank: Rank) -> int:
    """Rank 1 ends without a word while the others are in a collective."""
    if rank.groups.world_rank == 1:
        os._exit(7)
    return _wait_for_all(rank)


class CannotArrive:
    """A job that fails on its way to the rank, before anything of ours runs there."""

    def __reduce__(self) -> tuple:
        return _refuse_in_a_rank, ()


def _refuse_in_a_rank() -> CannotArrive:
    raise LookupError("planted before the rank's own code")


cannot_arrive = CannotArrive()


def no_device(rank: Rank) -> int:
    """Never called: there is no GPU for any rank."""
    raise AssertionError("never called")


if __name__ == "__main__":
    # Under its own name, so that the ranks can import the job.
    import jobs

    device = "cuda" if sys.argv[1] == "no_device" else "cpu"
    config = resolve_device(resolve(Config().replace(tp=2, pp=2, steps=1)), device)
    world, job = detect_world(os.environ), getattr(jobs, sys.argv[1])
    prepared = Prepared(config, job, {})
    if world:
        leave(join(world, lambda _: prepared))
    end(lambda: launch(prepared))
