"""Command lines as `pretrain` reads them, and what it would report."""

from __future__ import annotations

import pytest

from megalite import cli
from megalite.check import check
from megalite.config import Config, resolve
from megalite.errors import ConfigError
from megalite.parallel.environment import World
from megalite.pretrain import PROGRAM


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
    config = resolve(command.config, ranks.size if ranks else None)
    check(config, ranks, command.problems, command.unread)
    return config


def violations(*argv: str, ranks: World | None = None) -> list[str]:
    """All that is wrong."""
    with pytest.raises(ConfigError) as caught:
        run(*argv, ranks=ranks)
    return caught.value.violations
