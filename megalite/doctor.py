"""What will run on this machine, why nothing faster does, and whether it works.

python -m megalite.doctor                       this machine: its GPUs, or two ranks on its CPU
python -m megalite.doctor --ranks 8 --json
torchrun --nnodes 2 --nproc-per-node 8 -m megalite.doctor       all machines' ranks together

One row for each component; then a test of every collective between the ranks, with latency and
bandwidth, and of every operation against its definition. Exit code 0: all is well; 1: something is
broken, and the rows say what.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import megalite
from megalite.config import Config, resolve, resolve_device
from megalite.diagnosis.row import ABSENT, BROKEN, OK, Row, table
from megalite.errors import ConfigError
from megalite.parallel.environment import World, detect_world, wrong_variables
from megalite.program import end

if TYPE_CHECKING:
    from megalite.diagnosis.collectives import Measured
    from megalite.diagnosis.operations import Compared
    from megalite.parallel.launch import Prepared, Rank
    from megalite.parallel.machine import Machine

CPU_RANKS = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: flags; default: of this process.

    Returns:
        Exit code: 0 all well, 1 something is broken, 2 bad input, 5 ranks that hang.
    """
    words = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(words)
    try:
        world = detect_world(os.environ)
        if wrong := list(wrong_variables(os.environ)):
            raise ConfigError(wrong)
        from megalite.parallel.devices import own_machine
        from megalite.parallel.launch import join, launch

        with tempfile.TemporaryDirectory(prefix="megalite-") as folder:
            report = Path(folder) / "report.json"
            if world is None:
                machine = own_machine(_config(options, None))
                code = launch(_prepare(options, None, report, machine))
            else:
                code = join(world, partial(_prepare, options, world, report))
            if report.exists():
                print(report.read_text(encoding="utf-8"))
        return code
    except ConfigError as error:
        print(error.message(), file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megalite.doctor", description="What will run here, and whether it works."
    )
    parser.add_argument(
        "--ranks",
        type=int,
        default=0,
        metavar="N",
        help="Ranks of the self-test on this machine. Default: one for each GPU, or two on a CPU.",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="Where the self-test runs. auto: on the GPUs if there are enough. (default: auto)",
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    return parser


def _config(options: argparse.Namespace, world: World | None) -> Config:
    """A configuration of so many ranks.

    Raises:
        ConfigError: a number of ranks that cannot be.
    """
    import torch

    if options.ranks < 0:
        raise ConfigError(f"--ranks {options.ranks} must be above 0")
    if world is not None and options.ranks not in (0, world.size):
        raise ConfigError(
            f"--ranks {options.ranks}: {world.launcher} started {world.size}; leave it out"
        )
    gpus = torch.cuda.device_count() if options.device != "cpu" else 0
    ranks = world.size if world else options.ranks or gpus or CPU_RANKS
    return resolve(Config().replace(dp=ranks, device=options.device))


def _prepare(
    options: argparse.Namespace, world: World | None, report: Path, machine: Machine
) -> Prepared:
    """The rows of this machine, and the self-test as a job.

    Args:
        report: file for the JSON object, at first without a self-test.
    """
    from megalite.diagnosis.hardware import hardware
    from megalite.diagnosis.known_bad import known_bad
    from megalite.diagnosis.packages import packages
    from megalite.parallel.devices import choose_device
    from megalite.parallel.launch import Prepared

    config = _config(options, world)
    device, why = choose_device(config, machine)
    rows: list[Row] = []
    if world is None or machine.local_rank == 0:
        rows = [*hardware(), *packages(), *known_bad(machine.local_size)]
    if world is None or world.rank == 0:
        # Before the ranks start: they may be what is broken.
        if options.json:
            unfinished = [*_broken(rows), "the self-test did not finish"]
            report.write_text(_as_json(rows, why, [], [], unfinished), encoding="utf-8")
        else:
            print(f"megalite doctor {megalite.__version__}\n{table(rows)}\n", flush=True)
    told = report if options.json else None
    job = partial(_self_test, rows=tuple(rows), why=why, report=told)
    return Prepared(resolve_device(config, device), job, {})


def _self_test(rank: Rank, *, rows: tuple[Row, ...], why: str, report: Path | None) -> int:
    """One rank's part; returns the exit code, the same on all ranks.

    Args:
        rank: all ranks are on the data axis.
        rows: of this machine, on one rank of each.
        why: what the ranks run on.
        report: file for the JSON object; None: print for people.
    """
    import torch.distributed as dist

    from megalite.diagnosis.collectives import measure_collectives
    from megalite.diagnosis.operations import compare_operations
    from megalite_kernels import BackendError

    size, number = rank.config.world_size, rank.groups.world_rank
    measured = measure_collectives(rank.config, rank.groups, rank.device) if size > 1 else []
    rank.groups.activity.begin("self-test: operations")
    problems = _broken(rows)
    try:
        compared = compare_operations(rank.device)
    except BackendError as error:
        compared = []
        problems.append(f"kernels: {error}")
    problems += [f"rank {number}: {m.verb}: {m.problem}" for m in measured if m.problem]
    problems += [
        f"rank {number}: {c.operation} in {c.dtype}: error {c.error:.1e}, rounding explains "
        f"{c.bound:.1e}"
        for c in compared
        if not c.is_right
    ]
    everyone: list[Any] = [(problems, socket.gethostname(), rows)]
    if size > 1:
        everyone = [None] * size
        dist.all_gather_object(everyone, (problems, socket.gethostname(), rows))
    # Ranks may all say the same of the kernels.
    found = list(dict.fromkeys(problem for told, _, _ in everyone for problem in told))
    others = [
        replace(row, component=f"{host}: {row.component}")
        for _, host, theirs in everyone[1:]
        for row in theirs
        if row.state not in (OK, ABSENT) and row not in rows
    ]
    if number == 0 and report is None:
        print(_as_text(size, why, others, measured, compared, found), flush=True)
    elif number == 0 and report is not None:
        whole = _as_json([*rows, *others], why, measured, compared, found)
        report.write_text(whole, encoding="utf-8")
    # The launcher stops all ranks when the first one ends with a failure.
    rank.groups.wait_for_all(rank.device)
    return 1 if found else 0


def _broken(rows: Sequence[Row]) -> list[str]:
    return [f"{row.component}: {row.why}" for row in rows if row.state == BROKEN]


def _as_json(
    rows: Sequence[Row],
    why: str,
    measured: Sequence[Measured],
    compared: Sequence[Compared],
    problems: Sequence[str],
) -> str:
    """Everything as one object."""
    return json.dumps(
        {
            "megalite": megalite.__version__,
            "components": [asdict(row) for row in rows],
            "device": why,
            "collectives": [asdict(one) for one in measured],
            "operations": [asdict(one) for one in compared],
            "problems": list(problems),
        },
        indent=2,
    )


def _as_text(
    ranks: int,
    why: str,
    others: Sequence[Row],
    measured: Sequence[Measured],
    compared: Sequence[Compared],
    problems: Sequence[str],
) -> str:
    """What differs on other machines, and the self-test, for a terminal."""
    lines = ["on other machines:", table(others), ""] if others else []
    lines.append(f"self-test: {ranks} rank{'s' if ranks > 1 else ''} on {why}")
    if not measured:
        lines.append("  one rank: no collectives to test (--ranks 2 --device cpu tests gloo's)")
    for one in measured:
        speeds = ", ".join(
            f"{speed:.3g} GB/s at {size >> 20} MiB" for size, speed in one.bandwidth.items()
        )
        state = "WRONG" if one.problem else "ok"
        lines.append(f"  {one.verb:<20} {state:<5}  {one.latency_us:7.0f} us, {speeds}")
    for operation in compared:
        state = "ok" if operation.is_right else "WRONG"
        lines.append(
            f"  {operation.operation:<20} {state:<5}  {operation.dtype}: error "
            f"{operation.error:.1e} beside a bound of {operation.bound:.1e}"
        )
    lines += [f"  {problem}" for problem in problems]
    lines.append("all is well" if not problems else f"{len(problems)} problems")
    return "\n".join(lines)


def cli_main() -> NoReturn:
    """Entry point of the console script."""
    end(main)


if __name__ == "__main__":
    cli_main()
