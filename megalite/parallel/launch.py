"""Starting ranks on this machine, or joining those that torchrun or srun started.

A *job* is a picklable callable that one rank runs: `job(Rank) -> None`. Every way to start ends in
`run_rank`: rendezvous, agreement, groups, the job.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megalite.config import Config
from megalite.errors import ConfigError
from megalite.parallel.agree import agree
from megalite.parallel.environment import World, detect_world
from megalite.parallel.groups import ParallelGroups

LOST_PEER_PATIENCE_S = 5.0
"""How long a rank whose peer vanished waits to be stopped before it reports that itself."""


@dataclass(frozen=True)
class Rank:
    """What a job gets.

    Attributes:
        config: the run.
        groups: of this rank.
        device: of this rank.
    """

    config: Config
    groups: ParallelGroups
    device: torch.device


Job = Callable[[Rank], None]


def choose_device(config: Config, local_ranks: int) -> tuple[str, str]:
    """`cpu` or `cuda` for the ranks of this machine, and a phrase that says why.

    Raises:
        ConfigError: `--device cuda` with fewer GPUs than ranks.
    """
    gpus = torch.cuda.device_count()
    asked = config.parallel.device
    ranks = f"{local_ranks} rank" + ("s" if local_ranks > 1 else "")
    found = f"{gpus} GPU{'' if gpus == 1 else 's'} for {ranks} on this machine"
    if asked == "cuda" and gpus < local_ranks:
        raise ConfigError(
            f"--device cuda: {found}, and each rank needs its own; use fewer ranks or --device cpu"
        )
    if asked == "cpu":
        return "cpu", f"CPU (gloo), as asked; {_cores(local_ranks)}"
    if gpus >= local_ranks:
        back_end = "NCCL" if local_ranks > 1 else "one rank"
        return "cuda", f"{torch.cuda.get_device_name(0)} ({back_end}): {found}"
    return "cpu", f"CPU (gloo): {found}; {_cores(local_ranks)}"


def launch(config: Config, job: Job, facts: Mapping[str, Any]) -> int:
    """Start all ranks of the layout on this machine and wait for them.

    One rank runs in this process. More run under torchelastic, with rendezvous on loopback.

    Args:
        config: resolved, device included.
        job: what each rank runs.
        facts: what the ranks have to agree on beside the configuration.

    Returns:
        Exit code: 0, 2 if a rank found bad input, 128 + the signal that stopped us, else 1.
    """
    if config.world_size == 1:
        job(Rank(config, ParallelGroups.solo(), _rank_device(config, 0)))
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads(config.world_size)))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    _silence_torchelastic()
    start_method = _start_method()
    # The read end goes to every rank; it ends when this process does, however that happens.
    watched, alive = multiprocessing.get_context(start_method).Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="megalite-") as scratch:
        elastic = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=config.world_size,
            run_id="megalite",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            monitor_interval=0.1,
            start_method=start_method,
            logs_specs=DefaultLogsSpecs(log_dir=scratch),
        )
        try:
            elastic_launch(elastic, _launched_rank)(config, job, facts, watched)
        except ChildFailedError as error:
            return _report_failure(error)
        except SignalException as stop:
            print(f"megalite: stopped by {stop.sigval.name}", file=sys.stderr)
            return 128 + stop.sigval
        finally:
            alive.close()
    return 0


def join(
    config: Config,
    world: World,
    job: Job,
    facts: Mapping[str, Any],
    problems: Sequence[str] = (),
) -> int:
    """Run this process's rank of a world that a launcher started; see `launch`.

    If this rank has `problems`, all ranks are told and none starts the job.
    """
    os.environ.update(
        RANK=str(world.rank),
        WORLD_SIZE=str(world.size),
        LOCAL_RANK=str(world.local_rank),
        MASTER_ADDR=world.master_addr,
        MASTER_PORT=str(world.master_port),
    )
    return run_rank(config, world, job, facts, problems)


def run_rank(
    config: Config,
    world: World,
    job: Job,
    facts: Mapping[str, Any],
    problems: Sequence[str] = (),
) -> int:
    """Rendezvous, agree, create the groups, run the job.

    Returns:
        0; 2 if a rank found bad input; 1 if the job failed. Both are printed once for all ranks.
    """
    device = _rank_device(config, world.local_rank)
    timeout = timedelta(minutes=config.parallel.distributed_timeout_minutes)
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    store.set_timeout(timeout)
    everything = {**_comparable(config), **facts, "torch": torch.__version__}
    try:
        agree(dist.PrefixStore("agree", store), rank, size, everything, problems)
    except ConfigError as error:
        if rank == 0:
            print(error.message(), file=sys.stderr, flush=True)
        return 2
    try:
        if rank == 0:
            store.set("run name", config.run.name)
        config = config.replace(name=store.get("run name").decode())
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("default", store),
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
        job(Rank(config, ParallelGroups.create(config, device), device))
        dist.destroy_process_group()
    except ConfigError as error:
        if _claim_report(store):
            print(error.message(), file=sys.stderr, flush=True)
        return 2
    except Exception as error:
        _report_once(config, rank, store, error)
        return 1
    return 0


def _launched_rank(
    config: Config, job: Job, facts: Mapping[str, Any], launcher: Connection
) -> None:
    """Body of a rank that `launch` started; leaves the process on any failure."""
    # The default actions end the process at once, also in the middle of a collective.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_die_with, args=(launcher,), daemon=True).start()
    world = detect_world(os.environ)
    assert world is not None, "torchelastic sets RANK and WORLD_SIZE"
    leave(run_rank(config, world, job, facts))


def leave(code: int) -> None:
    """End a rank that failed at once: other ranks wait for it in collectives, which an orderly
    shutdown of the process group might wait for in turn."""
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _die_with(launcher: Connection) -> None:
    """End this process when the launcher's end of the pipe closes."""
    try:
        launcher.poll(None)
    finally:
        os._exit(1)


def _claim_report(store: dist.Store) -> bool:
    """Whether this rank is the first to report a failure; so each is shown once."""
    try:
        return store.add("failures", 1) == 1
    except Exception:  # the rank that hosts the store is gone, so nobody else can report
        return True


def _report_once(config: Config, rank: int, store: dist.Store, error: Exception) -> None:
    """Print the traceback of the rank that failed first."""
    if _is_lost_peer(error):
        # Not the cause: the peer reports itself, or the launcher names the signal it died of.
        time.sleep(LOST_PEER_PATIENCE_S)
    if _claim_report(store):
        topology = config.parallel
        print(
            f"megalite: rank {rank} of tp {topology.tp} x pp {topology.pp} x dp {topology.dp} "
            "failed:",
            file=sys.stderr,
        )
        traceback.print_exception(error, file=sys.stderr)
        sys.stderr.flush()


def _is_lost_peer(error: Exception) -> bool:
    words = ("closed by peer", "reset by peer", "Broken pipe", "Connection refused")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _report_failure(error: ChildFailedError) -> int:
    """Say which rank a signal killed; a rank that failed otherwise has said so itself."""
    rank, failure = min(error.failures.items())
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        print(f"megalite: rank {rank} was killed by {name}; all are stopped", file=sys.stderr)
    return 2 if failure.exitcode == 2 else 1


def _silence_torchelastic() -> None:
    """Its log repeats every failure as a wall of text; ours says it once."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _comparable(config: Config) -> dict[str, Any]:
    """The configuration as far as ranks must agree on it: not where things lie on a machine."""
    facts = config.to_dict()
    for name in ("runs", "name", "log_interval", "tensorboard"):
        del facts["run"][name]
    for name in ("data", "data_cache_path"):
        del facts["data"][name]
    return facts


def _start_method() -> str:
    """On Linux ranks are forked from a server that has imported torch once for all of them."""
    if sys.platform != "linux":
        return "spawn"
    multiprocessing.set_forkserver_preload(["megalite.trainer", "megalite.parallel.launch"])
    return "forkserver"


def _rank_device(config: Config, local_rank: int) -> torch.device:
    if config.parallel.device != "cuda":
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _threads(local_ranks: int) -> int:
    return max(1, _usable_cores() // local_ranks)


def _cores(local_ranks: int) -> str:
    cores = _usable_cores()
    threads = os.environ.get("OMP_NUM_THREADS", str(_threads(local_ranks)))
    text = f"{cores} cores, {threads} thread" + ("s" if threads != "1" else "") + " a rank"
    if local_ranks > cores:
        text += " (more ranks than cores: slower than one rank, for learning)"
    return text


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
