"""A pool of ranks that lives as long as the test run.

Starting eight ranks costs seconds each time; forking them once from the collected test process
costs a tenth of one. Ranks 0 .. n-1 of the pool form the world of each job, with their own
rendezvous, so that a job runs exactly what a launched rank runs.
"""

from __future__ import annotations

import contextlib
import gc
import io
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

SIZE = 8


@dataclass(frozen=True)
class Outcome:
    """What one rank of a job returned and printed."""

    value: Any
    stdout: str
    stderr: str


class RankPool:
    """Forked worker processes, one thread each."""

    def __init__(self, size: int = SIZE):
        context = multiprocessing.get_context("fork")
        self._ranks: list[tuple[Any, Connection]] = []
        for _ in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()
            self._ranks.append((process, here))

    def run(
        self, world_size: int, job: Callable[..., Any], *args: Any, timeout: float = 600
    ) -> list[Outcome]:
        """Run `job(*args)` on a fresh world; each rank finds RANK, WORLD_SIZE, ... set.

        Raises:
            RuntimeError: with the traceback of every rank that raised or died.
        """
        port = free_port()
        ranks = self._ranks[:world_size]
        for rank, (_, pipe) in enumerate(ranks):
            env = {
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            pipe.send((job, args, env))
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(ranks)}
        outcomes: dict[int, Outcome] = {}
        errors: list[str] = []
        while waiting:
            ready = wait(list(waiting), timeout)
            if not ready:
                raise RuntimeError(f"ranks {sorted(waiting.values())} never answered; {errors}")
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    error, outcome = pipe.recv()
                except EOFError:
                    raise RuntimeError(f"rank {rank} died; {errors}") from None
                outcomes[rank] = outcome
                if error:
                    errors.append(f"rank {rank}:\n{error}\n{outcome.stdout}\n{outcome.stderr}")
        if errors:
            raise RuntimeError("\n".join(errors))
        return [outcomes[rank] for rank in range(world_size)]

    def close(self) -> None:
        for process, pipe in self._ranks:
            pipe.close()
            process.join(5)
            process.kill()


def free_port() -> int:
    """A port that is free on loopback now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    # As torchrun sets it; a forked process cannot start OpenMP's threads anew.
    os.environ["OMP_NUM_THREADS"] = "1"
    clean = dict(os.environ)
    while True:
        try:
            job, args, env = pipe.recv()
        except EOFError:
            os._exit(0)
        os.environ.clear()
        os.environ.update(clean | env)
        out, err = io.StringIO(), io.StringIO()
        error, value = "", None
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                value = job(*args)
            except BaseException:
                error = traceback.format_exc()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        # What a job leaves in cycles holds gloo's threads, which poll.
        del job, args
        gc.collect()
        pipe.send((error, Outcome(value, out.getvalue(), err.getvalue())))
