"""Starting ranks on this machine, or joining those that torchrun or srun started.

A *job* is a picklable callable that one rank runs: `job(Rank)` returns an exit code. Every way to
start ends in `run_rank`: rendezvous, agreement, groups, the job.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import megalite
from megalite.config import Config
from megalite.errors import ConfigError, RunError
from megalite.events import Events, events_file
from megalite.exit_codes import ExitCode
from megalite.faults import Faults
from megalite.parallel import forkserver
from megalite.parallel.activity import Activity
from megalite.parallel.agree import MissingRanksError, agree
from megalite.parallel.devices import own_machine, rank_device, threads_of_a_rank
from megalite.parallel.environment import World, detect_world
from megalite.parallel.failures import Ending, claim_report, report_failure, report_once
from megalite.parallel.groups import ParallelGroups
from megalite.parallel.machine import Machine, find_machine
from megalite.parallel.progress import GpuProgress
from megalite.parallel.stop import STOPS, StopRequest, ignore_stops
from megalite.parallel.supervise import Asking, supervise
from megalite.parallel.watchdog import Watchdog, stops_at_once

RENDEZVOUS_LIMIT = timedelta(seconds=300)
"""How long ranks wait for the first sign of each other."""


WATCH = "watch"
"""Prefix of what ranks say of themselves in a store."""


@dataclass(frozen=True)
class Rank:
    """What a job gets.

    Attributes:
        config: the run.
        groups: of this rank.
        device: of this rank.
        store: in which ranks leave word for each other beside their collectives.
        attempt: how often the ranks have been started again.
        faults: what is injected on purpose into this rank.
        stop: whether it was asked to stop.
    """

    config: Config
    groups: ParallelGroups
    device: torch.device
    store: dist.Store = field(default_factory=dist.HashStore)
    attempt: int = 0
    faults: Faults = field(default_factory=Faults.none)
    stop: StopRequest = field(default_factory=StopRequest)


Job = Callable[[Rank], int]


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start.

    Attributes:
        config: resolved, device included.
        job: what each rank runs.
        facts: what the ranks have to agree on beside the configuration.
        claim: takes what the run must have for itself, its folder, and returns the configuration
            with its name; raises ConfigError. None if that is done.
    """

    config: Config
    job: Job
    facts: Mapping[str, Any]
    claim: Callable[[Config], Config] | None = None

    def claimed(self) -> Prepared:
        """This run with its claim made; nothing is claimed before it is sure to start."""
        if self.claim is None:
            return self
        return replace(self, config=self.claim(self.config), claim=None)


def launch(prepared: Prepared) -> int:
    """Start all ranks of the layout on this machine and wait for them; after a failure again, as
    often as --max-restarts says.

    One rank that is not started again runs in this process. More run under torchelastic, with
    rendezvous on loopback.

    Returns:
        Exit code: the job's, one of `ExitCode`, or 128 + the signal that stopped us at once.
    """
    prepared = prepared.claimed()
    config = prepared.config
    events = Events(events_file(config) if config.run.name else None)
    restarts = config.supervision.max_restarts
    start = _launch_ranks if config.world_size > 1 or restarts else _run_alone
    try:
        return supervise(partial(start, prepared), restarts, config.world_size, events)
    except (SignalException, KeyboardInterrupt) as stop:
        ignore_stops()
        forkserver.kill_all()
        number = getattr(stop, "sigval", signal.SIGINT)
        print(f"megalite: stopped by {number.name}", file=sys.stderr)
        events.write("stop", why=number.name, code=128 + number)
        return 128 + number


def _launch_ranks(prepared: Prepared, attempt: int, asking: Asking) -> Ending:
    """Start the ranks once under torchelastic and wait for them."""
    ranks = prepared.config.world_size
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_of_a_rank(ranks)))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    _silence_torchelastic()
    start_method = forkserver.start_method()
    # The read end goes to every rank; it ends when this process does, however that happens.
    watched, alive = multiprocessing.get_context(start_method).Pipe(duplex=False)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    board = dist.PrefixStore(WATCH, server)
    with alive, tempfile.TemporaryDirectory(prefix="megalite-") as scratch, asking.over(board):
        elastic = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id="megalite",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            monitor_interval=0.1,
            start_method=start_method,
            logs_specs=DefaultLogsSpecs(log_dir=scratch),
            signals_to_handle=",".join(_signals_to_handle()),
        )
        try:
            elastic_launch(elastic, _launched_rank)(prepared, watched, server.port, attempt)
        except ChildFailedError as error:
            return report_failure(error, board, ranks)
    return Ending(ExitCode.DONE)


def join(world: World, prepare: Callable[[Machine], Prepared]) -> int:
    """Run this process's rank of a world that a launcher started; see `launch`.

    Args:
        world: of this rank.
        prepare: called once this rank's machine is known. If it raises on any rank, all ranks are
            told and none starts the job.
    """
    os.environ.update(
        RANK=str(world.rank),
        WORLD_SIZE=str(world.size),
        MASTER_ADDR=world.master_addr,
        MASTER_PORT=str(world.master_port),
    )
    return run_rank(world, prepare)


def run_rank(
    world: World, prepare: Callable[[Machine], Prepared], board: dist.Store | None = None
) -> int:
    """Rendezvous, prepare, agree, create the groups, run the job.

    Args:
        world: of this rank.
        prepare: see `join`.
        board: where ranks say what they are doing; None: beside the rendezvous.

    Returns:
        The job's exit code, or one of `ExitCode`: what is wrong is printed once for all ranks.
    """
    who = f"rank {world.rank} of {world.size}"
    try:
        store = next(iter(dist.rendezvous("env://", timeout=RENDEZVOUS_LIMIT)))[0]
    except dist.DistError as error:
        where = f"{world.master_addr}:{world.master_port}"
        reason = str(error).splitlines()[0]
        print(f"megalite: {who}: the ranks did not all meet at {where}: {reason}", file=sys.stderr)
        return 1
    store = dist.PrefixStore(world.job, store)
    board = dist.PrefixStore(WATCH, board or store.clone())  # type: ignore[attr-defined]
    activity, stop = Activity(), StopRequest()
    stop.at_once = partial(stops_at_once, board)
    with Watchdog(board, world.rank, world.size, activity, stop) as watchdog:
        try:
            machine = find_machine(store, world)
            prepared = _agreed(store, world, machine, prepare, activity)
            if isinstance(prepared, ExitCode):
                return prepared
            layout = prepared.config.parallel
            who = f"rank {world.rank} of tp {layout.tp} x pp {layout.pp} x dp {layout.dp}"
            code = _run_job(store, world, machine, prepared, watchdog, activity, stop)
        except (ConfigError, RunError) as error:
            if claim_report(store):
                print(error.message(), file=sys.stderr, flush=True)
            return error.code
        except MissingRanksError as error:
            if world.rank == 0:
                print(f"megalite: {error}", file=sys.stderr, flush=True)
            return 1
        except Exception as error:
            return report_once(who, store, watchdog, error)
    return code


def _run_job(
    store: dist.Store,
    world: World,
    machine: Machine,
    prepared: Prepared,
    watchdog: Watchdog,
    activity: Activity,
    stop: StopRequest,
) -> int:
    """Create the groups and run the job; returns its exit code."""
    config = prepared.config
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads_of_a_rank(machine.local_size))
    activity.begin("start: opening the device")
    device = rank_device(config, machine)
    if device.type == "cuda":
        activity.progress = GpuProgress(device)
    activity.begin("start: connecting the ranks")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("default", store),
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(minutes=config.parallel.distributed_timeout_minutes),
        device_id=device if device.type == "cuda" else None,
    )
    groups = ParallelGroups.create(config, device, activity)
    folder = Path(config.run.runs) / config.run.name if config.run.name else None
    file = events_file(config) if config.run.name and world.rank == 0 else None
    watchdog.watch(groups.calls(), folder, Events(file, world.attempt))
    activity.begin("start: building the model")
    talk = dist.PrefixStore("job", store.clone())  # type: ignore[attr-defined]
    faults = Faults.of(os.environ, world.rank, world.attempt)
    code = prepared.job(Rank(config, groups, device, talk, world.attempt, faults, stop))
    activity.begin("the end")
    dist.destroy_process_group()
    return code


def _agreed(
    store: dist.Store,
    world: World,
    machine: Machine,
    prepare: Callable[[Machine], Prepared],
    activity: Activity,
) -> Prepared | ExitCode:
    """What all ranks are ready to run alike; if they are not, which rank 0 says, how it ends."""
    prepared, failure, problems = None, None, list[str]()
    code = ExitCode.BAD_INPUT
    facts: dict[str, Any] = {}
    limit_s = RENDEZVOUS_LIMIT.total_seconds()
    # A corpus may have to be tokenized: that takes as long as it takes, and the others wait.
    activity.begin("start: preparing the data", patient=True)
    try:
        prepared = prepare(machine)
    except ConfigError as error:
        problems, code = error.violations, error.code
    except Exception as error:
        # The other ranks may be fine, and would wait for this one.
        failure, problems = error, [f"{type(error).__name__}: {error}"]
    if prepared is not None:
        limits = prepared.config.supervision
        limit_s = 60 * prepared.config.parallel.distributed_timeout_minutes
        activity.start_limit_s, activity.step_limit_s = limits.start_timeout, limits.step_timeout
        activity.save_limit_s = limits.save_timeout
        activity.longest_wait_s = limit_s
        facts = {
            **_comparable(prepared.config),
            **prepared.facts,
            "megalite": megalite.__version__,
            "torch": torch.__version__,
        }
    activity.begin("start: waiting until all ranks are ready")
    try:
        agree(dist.PrefixStore("run", store), world.rank, world.size, facts, problems, limit_s)
        assert prepared is not None, "a rank without a run has problems"
        if world.rank == 0:
            try:
                prepared = prepared.claimed()
            except ConfigError as error:
                problems = error.violations
        agree(dist.PrefixStore("claim", store), world.rank, world.size, {}, problems, limit_s)
    except ConfigError as error:
        if failure is not None:
            raise failure from None
        if world.rank == 0:
            print(error.message(), file=sys.stderr, flush=True)
        return code
    if world.rank == 0:
        store.set("name", prepared.config.run.name)
    named = prepared.config.derive(name=store.get("name").decode())
    return replace(prepared, config=named)


def _run_alone(prepared: Prepared, _attempt: int, _asking: Asking) -> Ending:
    """The only rank, in this process, which hears signals itself."""
    return Ending(_code_alone(prepared), "a failure")


def _code_alone(prepared: Prepared) -> int:
    machine = own_machine(prepared.config)
    try:
        device = rank_device(prepared.config, machine)
        faults = Faults.of(os.environ, 0, 0)
        return prepared.job(Rank(prepared.config, ParallelGroups.solo(), device, faults=faults))
    except ConfigError:
        raise
    except RunError as error:
        print(error.message(), file=sys.stderr, flush=True)
        return error.code
    except Exception as error:
        return report_once("the run", None, None, error)


def _launched_rank(prepared: Prepared, launcher: Connection, board_port: int, attempt: int) -> None:
    """Body of a rank that `launch` started; leaves the process on any failure."""
    # Ctrl-C reaches the launcher too, which decides. The default actions of the others end the
    # process at once, also in the middle of a collective.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for stop in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(stop, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)  # see `forkserver.start_method`
    threading.Thread(target=_die_with, args=(launcher,), daemon=True).start()
    world = detect_world(os.environ)
    assert world is not None, "torchelastic sets RANK and WORLD_SIZE"
    board = dist.TCPStore("127.0.0.1", board_port, is_master=False)
    leave(run_rank(replace(world, attempt=attempt), lambda _: prepared, board))


def _signals_to_handle() -> list[str]:
    """Signals that stop all ranks at once, but for those that nohup or a shell has told us to
    ignore; `supervise` answers the others."""
    stops = (signal.SIGHUP, signal.SIGQUIT)
    return [stop.name for stop in stops if signal.getsignal(stop) is not signal.SIG_IGN]


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
