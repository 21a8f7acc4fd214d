"""Command lines of the tools: every word is looked at, and all that is wrong is told at once."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, NoneType
from typing import Any, NoReturn, TypeVar

from megalite.errors import ConfigError
from megalite.field_values import suggest
from megalite.output import reader_gone

T = TypeVar("T")


_METAVARS: Mapping[type, str] = MappingProxyType(
    {int: "N", NoneType: "N", float: "NUMBER", str: "VALUE", tuple: "VALUE"}
)


@dataclass(frozen=True)
class Flag:
    """A flag of a tool.

    Attributes:
        name: with its dashes.
        doc: for `--help`.
        default: what it is without; its type says what it takes: a bool nothing (one that is on can
            be put off by `--no-...`), an int or None a whole number, a float a number, a str one
            value, a tuple one or more.
        choices: the values that a str may have; () for any.
        metavar: what `--help` calls its value; default: the choices, or a word for the type.
        required: without it there is nothing to do.
    """

    name: str
    doc: str
    default: bool | int | float | str | tuple[str, ...] | None = ""
    choices: tuple[str, ...] = ()
    metavar: str = ""
    required: bool = False

    @property
    def shown_value(self) -> str:
        """Its value in `--help`."""
        name = self.metavar or "|".join(self.choices) or _METAVARS[type(self.default)]
        return f"{name} [...]" if isinstance(self.default, tuple) else name


class Values(dict[str, Any]):
    """Values by the flags' names without dashes.

    Attributes:
        given: what was typed of the flags that were: `--workers 3`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[str, str] = {}

    def no_effect(self, name: str, otherwise: str) -> list[str]:
        """A sentence if a flag was given that asks for something; as of a run's flags."""
        if name not in self.given or not self[name]:
            return []
        return [f"{self.given[name]} has no effect {otherwise}; leave it out"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


class _Help(argparse.RawDescriptionHelpFormatter):
    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:  # noqa: ARG002
        return str(action.metavar)


def read_flags(
    argv: Sequence[str],
    flags: Sequence[Flag],
    *,
    prog: str,
    description: str,
    refused: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Values, list[str]]:
    """Values by the flags' names without dashes, and a sentence for everything that is wrong.

    Args:
        argv: words of the command line.
        flags: that there are.
        prog, description: of the tool, for `--help`.
        refused: flags of Megatron-LM's tool that are not here, and why.

    Raises:
        SystemExit: after printing `--help`.
    """
    parser = _Parser(
        prog=prog,
        description=description,
        formatter_class=_Help,
        usage=" ".join(["%(prog)s", *_required(flags), "[flags]"]),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for flag in flags:
        takes = type(flag.default)
        if takes is bool:
            action = argparse.BooleanOptionalAction if flag.default else "store_true"
            doc = flag.doc + (" (default: on)" if flag.default else "")
            parser.add_argument(flag.name, action=action, help=doc)
            continue
        doc = flag.doc + (f" (default: {_shown(flag.default)})" if flag.default else "")
        # Any number of values, so that a wrong number is one problem among others.
        doc = doc.replace("%", "%%")
        parser.add_argument(flag.name, nargs="*", metavar=flag.shown_value, help=doc)
    given, unknown = parser.parse_known_args(list(argv))
    problems = _unknown(unknown, [flag.name for flag in flags], refused)
    values = Values()
    for flag in flags:
        key = flag.name.lstrip("-").replace("-", "_")
        values[key] = flag.default
        if not hasattr(given, key):
            problems += [f"{flag.name} is missing"] if flag.required else []
            continue
        words = getattr(given, key)
        values.given[key] = " ".join([flag.name, *(words if isinstance(words, list) else [])])
        try:
            values[key] = _value(flag, words)
        except ValueError as error:
            problems.append(f"{flag.name} {error}")
    return values, problems


def _required(flags: Sequence[Flag]) -> list[str]:
    return [f"{flag.name} {flag.shown_value}" for flag in flags if flag.required]


def _value(flag: Flag, given: Any) -> Any:
    """What was given, as the flag's type."""
    if isinstance(flag.default, bool):
        return given
    if not given or not all(given):
        raise ValueError("needs a value")
    if isinstance(flag.default, tuple):
        return tuple(given)
    value, *left_over = given
    if left_over:
        raise ValueError(f"takes one value; {' '.join(left_over)} is left over")
    if isinstance(flag.default, int | None):
        try:
            return int(value)
        except ValueError:
            raise ValueError(f"{value}: expected a whole number") from None
    if isinstance(flag.default, float):
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"{value}: expected a number") from None
    if flag.choices and value not in flag.choices:
        raise ValueError(f"{value} is unknown{suggest(value, flag.choices, every=True)}")
    return value


def _unknown(words: Sequence[str], known: Sequence[str], refused: Mapping[str, str]) -> list[str]:
    problems = []
    after_flag = False
    for word in words:
        flag = word.partition("=")[0]
        if not word.startswith("-"):
            if not after_flag:
                problems.append(f"{word!r} stands alone: values follow a flag")
            continue
        after_flag = True
        if flag in refused:
            problems.append(f"{flag} is not in megalite: {refused[flag]}")
        else:
            problems.append(f"unknown flag {flag}{suggest(flag, known)}")
    return problems


def _shown(default: object) -> str:
    return " ".join(default) if isinstance(default, tuple) else str(default)


def together(problems: list[str], prepare: Callable[[], T]) -> T:
    """What `prepare` returns.

    Raises:
        ConfigError: the problems so far and those that `prepare` finds.
    """
    try:
        prepared = prepare()
    except ConfigError as error:
        raise ConfigError([*problems, *error.violations]) from None
    if problems:
        raise ConfigError(problems)
    return prepared


def end(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a tool's `main` on this process's words; exit with its code, 2 for bad input, 3
    for damaged files."""
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        code = reader_gone()
    except ConfigError as error:
        print(error.message(), file=sys.stderr)
        code = error.code
    except KeyboardInterrupt as interrupt:
        stop = signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT
        print(f"megalite: {interrupt or f'stopped by {stop.name}'}", file=sys.stderr)
        code = 128 + stop
    sys.exit(code)


class Terminated(KeyboardInterrupt):
    """SIGTERM, as Slurm, Kubernetes and `kill` send it, where it ends a tool as Ctrl-C does."""


def terminate_as_interrupt() -> None:
    """Have SIGTERM raise `Terminated` in this process, once: what follows is cleaning up."""

    def stop(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:  # as a parent may have told us
        signal.signal(signal.SIGTERM, stop)
