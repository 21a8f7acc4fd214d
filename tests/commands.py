"""Command lines as `pretrain` reads them, and what it would report."""

from __future__ import annotations

import pytest

from megalite import cli
from megalite.config import Config
from megalite.errors import ConfigError
from megalite.parallel.environment import World
from megalite.pretrain import PROGRAM
from megalite.program import checked


def parse(*argv: str) -> cli.Command:
    """The words alone; raises what is wrong with them."""
    command = cli.parse(argv, prog="megalite", description="A test.", switches=PROGRAM.switches)
    if command.problems:
        raise ConfigError(command.problems)
    return command


def word_violations(*argv: str) -> list[str]:
    """What is wrong with the words alone."""
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    return caught.value.violations


def run(*argv: str, ranks: World | None = None) -> Config:
    """Parse, resolve and check; raises all that is wrong."""
    command = cli.parse(argv, prog="megalite", description="A test.", switches=PROGRAM.switches)
    return checked(command, ranks)


def violations(*argv: str, ranks: World | None = None) -> list[str]:
    """All that is wrong."""
    with pytest.raises(ConfigError) as caught:
        run(*argv, ranks=ranks)
    return caught.value.violations
