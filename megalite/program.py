"""What the programs share: from the command line to ranks that run a job, and back to an exit code.

No torch import: a program's `--help` and `--dry-run` need none.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from megalite import cli
from megalite.check import check
from megalite.config import Config, resolve
from megalite.errors import ConfigError
from megalite.faults import wrong_faults
from megalite.output import reader_gone
from megalite.parallel.environment import World, detect_world, wrong_variables
from megalite.parallel.stop import STOPS, ignore_stops, raise_at

if TYPE_CHECKING:
    from megalite.parallel.launch import Prepared
    from megalite.parallel.machine import Machine


@dataclass(frozen=True)
class Program:
    """A program whose flags are those of a run.

    Attributes:
        name: as people start it.
        description: for `--help`.
        switches: flags of its own, without a value, with their help.
        show: does what a switch asks for in place of a run; returns whether one was given.
        machine: this machine, for ranks that will be started on it.
        prepare: what each rank runs; raises ConfigError for all that is wrong with flags, files or
            devices. Called once the machine is known.
    """

    name: str
    description: str
    switches: Mapping[str, str]
    show: Callable[[cli.Command, World | None], bool]
    machine: Callable[[cli.Command], Machine]
    prepare: Callable[[cli.Command, World | None, Machine], Prepared]

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run the command.

        Args:
            argv: flags; default: of this process.

        Returns:
            Exit code: the job's, one of `ExitCode`, or 128 + the signal that stopped it at once.
        """
        words = sys.argv[1:] if argv is None else argv
        try:
            world = detect_world(os.environ)
            command = cli.parse(
                words, prog=self.name, description=self.description, switches=self.switches
            )
            if self.show(command, world):
                return 0
            if world is None:
                prepared = self.prepare(command, None, self.machine(command))
                from megalite.parallel.launch import launch

                return launch(prepared)
        except ConfigError as error:
            print(error.message(), file=sys.stderr)
            return error.code
        from megalite.parallel.launch import join

        # Whatever is wrong with this rank's flags or files, the others have to know.
        return join(world, partial(self.prepare, command, world))

    def exit(self) -> NoReturn:
        """Run this process's command and end the process."""
        end(self.main)


def end(main: Callable[[], int]) -> NoReturn:
    """Run a program's `main` and end the process with its exit code."""
    try:
        raise_at(_stops())
        code = main()
        ignore_stops()
        sys.stdout.flush()
    except BrokenPipeError:
        code = reader_gone()
    except KeyboardInterrupt as stop:
        # An impatient second Ctrl-C has nothing more to stop.
        ignore_stops()
        number = getattr(stop, "sigval", signal.SIGINT)
        print(f"\nmegalite: stopped by {number.name}", file=sys.stderr)
        code = 128 + number
    dist = sys.modules.get("torch.distributed")
    if code and dist is not None and dist.is_initialized():
        from megalite.parallel.launch import leave

        leave(code)
    sys.exit(code)


def _stops() -> tuple[signal.Signals, ...]:
    """The signals that this process answers itself.

    A launcher ends its ranks by SIGTERM, whose default action ends them at once, also in the middle
    of a collective.
    """
    try:
        return (signal.SIGINT,) if detect_world(os.environ) else STOPS
    except ConfigError:
        return STOPS  # `main` will say it


def checked(command: cli.Command, world: World | None) -> Config:
    """The resolved configuration.

    Args:
        command: parsed.
        world: ranks that a launcher has started, if any.

    Raises:
        ConfigError: all that is wrong with environment variables, words and values.
    """
    config = resolve(command.config, world.size if world else None)
    asked = [*wrong_variables(os.environ), *wrong_faults(os.environ, config.world_size)]
    problems = [*asked, *command.problems]
    check(config, world, problems, command.unread, command.given)
    return config
