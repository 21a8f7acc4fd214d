"""Is a layout right? Run it small, beside one rank and beside the definition.

python -m megalite.verify --model llama3-8b --tp 4 --pp 2
python -m megalite.verify --tp 2 --pp 2 --dp 2 --tie-embeddings --schedule gpipe

The flags are those of the run that one means to start. The configuration is shrunk to what a laptop
runs in seconds, with its structure kept, and trained for a few steps with warm-up, decay, clipping,
uneven token counts and a step that has to be skipped. Every loss, named gradient, gradient norm and
weight on every rank is compared with a definition of the run in plain torch, and so is the one-rank
run. Exit code 0: equal up to rounding; 1: not, and what differs first is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, NoReturn

from megalite import cli
from megalite.config import fields, resolve
from megalite.config_file import to_toml
from megalite.effects import notes
from megalite.parallel.environment import World
from megalite.planning.choice import choose_by_estimate
from megalite.program import Program, checked
from megalite.run_plan import AUTO, plan_facts
from megalite.verification.shrink import MOST_RANKS, Small, shrink

if TYPE_CHECKING:
    from megalite.parallel.launch import Prepared, Rank
    from megalite.parallel.machine import Machine


def _small(command: cli.Command, world: World | None) -> Small:
    """What will run.

    Raises:
        ConfigError: all that is wrong with the user's own configuration.
    """
    # The data stays where it is: random tokens serve, with ends of documents in them; and nothing
    # is written.
    boundaries = {
        name: getattr(command.config.data, name)
        for name in ("reset_attention_mask", "reset_position_ids", "packing")
    }
    unread = dict.fromkeys(("reset_attention_mask", "reset_position_ids", "eod_mask_loss"), False)
    groups = {spec.name: spec.group for spec in fields()}
    # How long it trains does not matter here, and random tokens have no epochs.
    length = {"num_epochs": 0, "steps": 1} if command.config.train.num_epochs else {}
    command = replace(
        command,
        config=command.config.replace(
            data=(),
            train_data_path=(),
            valid_data_path=(),
            test_data_path=(),
            data_order="epoch",
            order_samples=0,
            packing="stream",
            fim_rate=0.0,
            mock_data=True,
            **unread,
            **length,
        ),
        given={n: typed for n, typed in command.given.items() if groups[n] not in ("data", "run")},
    )
    config = checked(command, world).replace(**boundaries)
    if config.parallel.device == "auto":
        config = config.replace(device="cpu")
    if config.parallel.schedule == AUTO:
        chosen = choose_by_estimate(config).config.parallel
        config = config.replace(schedule=chosen.schedule, chunks=chosen.chunks)
    return shrink(config, max(MOST_RANKS, world.size if world else 0))


def _show(command: cli.Command, world: World | None) -> bool:
    """Print the small configuration, if that is what was asked for."""
    if "--print-config" not in command.switches:
        return False
    if world is None or world.rank == 0:
        print(to_toml(_small(command, world).config), end="")
    return True


def _machine(command: cli.Command) -> Machine:
    """This machine, once there is nothing wrong with the flags."""
    small = _small(command, None)
    from megalite.parallel.devices import own_machine

    return own_machine(small.config)


def _prepare(command: cli.Command, world: World | None, machine: Machine) -> Prepared:
    """The small configuration, and the comparison as a job."""
    small = _small(command, world)
    from megalite.parallel.devices import choose_device, require_kernels
    from megalite.parallel.launch import Prepared

    device, _ = choose_device(small.config, machine)
    precisions = _precisions(command.config.train.precision, device)
    require_kernels(device, precisions, machine)
    told = notes(resolve(command.config, world.size if world else None), command.given)
    if command.config.parallel.schedule == AUTO and small.config.parallel.pp > 1:
        chosen = small.config.parallel
        told += (
            f"--schedule auto: {chosen.schedule} with --chunks {chosen.chunks} is verified, the "
            "choice by shape; a run chooses by measured costs",
        )
    job = partial(
        _compare,
        name=command.config.model.model,
        changes=small.changes,
        precisions=precisions,
        watch="--activations" in command.switches,
        told=told,
    )
    config = small.config.replace(device=device, precision=precisions[0])
    return Prepared(config, job, plan_facts(command.config))


def _precisions(asked: str, device: str) -> tuple[str, ...]:
    """fp64 for the mathematics; then what the run itself computes in."""
    usual = {"cpu": "fp32", "cuda": "bf16"}[device]
    wanted = ["fp64", usual if asked == "auto" else asked]
    if device == "cpu":
        wanted.insert(1, "fp32")
    return tuple(dict.fromkeys(wanted))


def _compare(
    rank: Rank,
    *,
    name: str,
    changes: tuple[str, ...],
    precisions: tuple[str, ...],
    watch: bool,
    told: tuple[str, ...],
) -> int:
    """One rank's part; returns the exit code, the same on all ranks."""
    from megalite.layers.sdpa import fastest_attention
    from megalite.verification.run import verify
    from megalite.verification.tell import failure, success, what

    first = rank.groups.world_rank == 0
    if first:
        lines = [what(rank.config, name, changes, precisions), *(f"note: {note}" for note in told)]
        print("\n".join(lines), flush=True)
    with fastest_attention(rank.device):
        verdict = verify(rank.config, rank.groups, rank.device, precisions=precisions, watch=watch)
    failed = verdict.failed
    if first:
        print(success(verdict) if failed is None else failure(failed), flush=True)
    # The launcher stops all ranks when the first one ends with a failure.
    rank.groups.wait_for_all(rank.device)
    return 0 if failed is None else 1


PROGRAM = Program(
    name="python -m megalite.verify",
    description="Prove on this machine that a layout trains as one rank does. The flags are those "
    "of the run; the configuration is shrunk, its structure kept.",
    switches=MappingProxyType(
        {
            "--activations": "Compare the activations of every layer too.",
            "--print-config": "Print the shrunk configuration as TOML.",
        }
    ),
    show=_show,
    machine=_machine,
    prepare=_prepare,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in this process; returns its exit code."""
    return PROGRAM.main(argv)


def cli_main() -> NoReturn:
    """Entry point of the console script."""
    PROGRAM.exit()


if __name__ == "__main__":
    cli_main()
