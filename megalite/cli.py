"""The command line: generated from `megalite.config`, merged as preset < file < flags.

All problems of a command are collected and raised together as one `ConfigError`.
No torch import.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
import tomllib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, get_args

from megalite.config import ALTERNATIVES, Config, FieldSpec, fields
from megalite.errors import ConfigError
from megalite.megatron_flags import MEGATRON_FLAGS, Alias, Always, Refused
from megalite.presets import PRESETS

_TITLES: Mapping[str, str] = MappingProxyType(
    {
        "model": "model",
        "parallel": "layout",
        "train": "training",
        "data": "data",
        "run": "run",
    }
)


@dataclass(frozen=True)
class Command:
    """A parsed command line.

    Attributes:
        config: preset, file and flags merged; derived values are still open.
        dry_run: describe the run and start nothing.
        print_config: print the resolved configuration and start nothing.
    """

    config: Config
    dry_run: bool
    print_config: bool


def parse(argv: Sequence[str], *, prog: str, description: str) -> Command:
    """Parse flags and the file they may name.

    Raises:
        ConfigError: unknown, misused or contradicting flags, unreadable file, wrong types: all.
        SystemExit: after printing `--help`.
    """
    if "-h" in argv or "--help" in argv:
        _help_parser(prog, description).print_help()
        raise SystemExit(0)
    problems: list[str] = []
    words = _scan(argv, problems)
    specs = {spec.name: spec for spec in fields()}
    flags = _flag_values(words, specs, problems)
    file = {}
    if "--config" in words:
        file = _read_file(Path(words["--config"][0]), specs, problems)
    preset = {**file, **flags}.get("model", specs["model"].default)
    if preset not in PRESETS:
        problems.append(f"--model {preset} is not a preset{_suggest(preset, PRESETS, every=True)}")
    if problems:
        raise ConfigError(problems)
    values: dict[str, Any] = {}
    for layer in (PRESETS[preset], file, flags):
        _lay_over(values, layer, specs)
    return Command(
        config=Config().replace(**values),
        dry_run="--dry-run" in words,
        print_config="--print-config" in words,
    )


def to_toml(config: Config) -> str:
    """The configuration as a file that `--config` reads."""
    lines = []
    for group, values in config.to_dict().items():
        lines.append(f"[{group}]")
        # TOML has no null; a value that is left open is left out.
        lines += [f"{name} = {_toml_value(v)}" for name, v in values.items() if v is not None]
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    # JSON's text form is TOML's, but for DEL, which TOML wants escaped too.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _scan(argv: Sequence[str], problems: list[str]) -> dict[str, list[str]]:
    """The flags given, each with its values. Of a flag given twice the last counts.

    argparse would stop at the first problem; here every word is looked at.
    """
    arities = _arities()
    found: dict[str, list[str]] = {}
    queue = deque(argv)

    def values_that_follow() -> list[str]:
        values = []
        while queue and not _is_flag(queue[0]):
            values.append(queue.popleft())
        return values

    while queue:
        word = queue.popleft()
        flag, has_value, value = word.partition("=")
        if not _is_flag(word):
            problems.append(f"{word!r} stands alone: values follow a flag, as in --data {word}")
        elif flag not in arities:
            problems.append(f"unknown flag {flag}{_suggest(flag, arities)}")
            values_that_follow()
        elif arities[flag] == 0:
            if has_value:
                problems.append(f"{flag} takes no value, but is given {value!r}")
            found.pop(_opposite(flag), None)
            found[flag] = []
        elif arities[flag] is None:
            found[flag] = values_that_follow()
        else:
            values = ([value] if has_value else []) + values_that_follow()
            found[flag] = values[:1]
            if not values:
                problems.append(f"{flag} needs a value")
                del found[flag]
            elif len(values) > 1:
                problems.append(f"{flag} takes one value; {' '.join(values[1:])} is left over")
    return found


def _is_flag(word: str) -> bool:
    """Whether a word is a flag, right or wrong; a negative number is none."""
    return re.match(r"--?[A-Za-z]", word) is not None


def _opposite(flag: str) -> str:
    """--no-x of --x, and --x of --no-x: of the two the last counts."""
    return "--" + flag[5:] if flag.startswith("--no-") else "--no-" + flag[2:]


def _arities() -> dict[str, int | None]:
    """How many values each flag takes; None for any number, of flags that are refused anyway."""
    arities: dict[str, int | None] = {"--config": 1, "--dry-run": 0, "--print-config": 0}
    for spec in fields():
        if _is_bool(spec):
            arities |= {spec.flag: 0, _opposite(spec.flag): 0}
        else:
            arities[spec.flag] = 1
    for flag, meaning in MEGATRON_FLAGS.items():
        assert flag not in arities, f"{flag} is a flag of ours and of the Megatron table"
        match meaning:
            case Refused():
                arities[flag] = None
            case Always(values=()) | Alias(value=str()):
                arities[flag] = 0
            case _:
                arities[flag] = 1
    return arities


def _flag_values(
    words: Mapping[str, list[str]], specs: Mapping[str, FieldSpec], problems: list[str]
) -> dict[str, Any]:
    """Values of the fields that flags set, ours and Megatron-LM's."""
    by_field: dict[str, dict[str, Any]] = {}
    for flag, field, text in _assignments(words, specs, problems):
        try:
            by_field.setdefault(field, {})[flag] = _convert(specs[field], text)
        except ValueError as error:
            problems.append(f"{flag} {text}: {error}")
    for given in by_field.values():
        first, *others = given
        for flag in others:
            if given[flag] != given[first]:
                typed = (" ".join([name, *words[name]]) for name in (first, flag))
                problems.append(f"{' and '.join(typed)} contradict: give one")
    values = {field: list(given.values())[-1] for field, given in by_field.items() if given}
    for first_name, second_name in ALTERNATIVES:
        if all(_has_effect(values, specs, name) for name in (first_name, second_name)):
            pair = (next(iter(by_field[name])) for name in (first_name, second_name))
            problems.append(f"{' and '.join(pair)} contradict: give one")
    return values


def _assignments(
    words: Mapping[str, list[str]], specs: Mapping[str, FieldSpec], problems: list[str]
) -> Iterator[tuple[str, str, str]]:
    """(flag, field, text) of every flag that sets a field."""
    for spec in specs.values():
        if _is_bool(spec):
            if spec.flag in words:
                yield spec.flag, spec.name, "true"
            if _opposite(spec.flag) in words:
                yield _opposite(spec.flag), spec.name, "false"
        elif spec.flag in words:
            yield spec.flag, spec.name, words[spec.flag][0]
    for flag, meaning in MEGATRON_FLAGS.items():
        if flag not in words:
            continue
        match meaning:
            case Refused(why=why):
                problems.append(f"{flag} is not in megalite: {why}")
            case Always(why=why, values=values):
                if values and words[flag][0] not in values:
                    problems.append(f"{flag} {words[flag][0]} is not in megalite: {why}")
            case Alias(field=field, value=None):
                yield flag, field, words[flag][0]
            case Alias(field=field, value=str(value)):
                yield flag, field, value


def _lay_over(
    values: dict[str, Any], layer: Mapping[str, Any], specs: Mapping[str, FieldSpec]
) -> None:
    """Put a layer over those below it; of two alternatives it takes the other's place there."""
    for pair in ALTERNATIVES:
        for name, other in (pair, pair[::-1]):
            if _has_effect(layer, specs, name) and other not in layer:
                values.pop(other, None)
    values.update(layer)


def _has_effect(values: Mapping[str, Any], specs: Mapping[str, FieldSpec], name: str) -> bool:
    """Whether a field is given, and not only as the value that leaves it to its alternative."""
    neutral = None if name == "lr_warmup_fraction" else specs[name].default
    return name in values and values[name] != neutral


def _read_file(path: Path, specs: Mapping[str, FieldSpec], problems: list[str]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"--config {path} cannot be read: {getattr(error, 'strerror', error)}")
        return {}
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        problems.append(f"--config {path} is not valid {kind}: {error}")
        return {}
    if not isinstance(content, dict):
        problems.append(f"--config {path} must hold names and values, as --print-config shows")
        return {}
    values: dict[str, Any] = {}
    for name, value in _named_values(path, content, problems):
        spec = specs.get(name.replace("-", "_"))
        if spec is None:
            problems.append(f"--config {path}: no field {name!r}{_suggest(name, specs)}")
        elif spec.name in values:
            problems.append(f"--config {path}: {name} is given twice")
        elif value is not None:
            try:
                values[spec.name] = _convert(spec, value)
            except ValueError as error:
                problems.append(f"--config {path}: {name} = {value}: {error}")
    return values


def _named_values(
    path: Path, content: Mapping[str, Any], problems: list[str]
) -> Iterator[tuple[str, Any]]:
    """The fields of a file, in groups or without."""
    for name, value in content.items():
        if not isinstance(value, dict):
            yield name, value
        elif name in _TITLES:
            yield from value.items()
        else:
            problems.append(f"--config {path}: no group {name!r}{_suggest(name, _TITLES)}")


def _help_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The flags as argparse lays them out; it only prints the help."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=100),
        epilog="Megatron-LM's long names are accepted where they mean the same: "
        "docs/megatron_flags.md. Values: preset < --config file < flags. Defaults are those of "
        "the preset tiny.",
        usage="%(prog)s [flags]",
    )
    parser._optionals.title = "general"
    parser.add_argument("--config", metavar="FILE", help="Read values from a .toml or .json file.")
    parser.add_argument(
        "--dry-run", action="store_true", help="Describe the run, its memory and its pipeline."
    )
    parser.add_argument(
        "--print-config", action="store_true", help="Print the resolved values as TOML."
    )
    groups = {group: parser.add_argument_group(title) for group, title in _TITLES.items()}
    for spec in fields():
        extra: dict[str, Any] = {"metavar": spec.metavar or None}
        if _is_bool(spec):
            extra = {"action": argparse.BooleanOptionalAction}
        elif spec.choices:
            extra = {"metavar": "|".join(spec.choices)}
        groups[spec.group].add_argument(spec.flag, dest=spec.name, help=_help(spec), **extra)
    return parser


def _help(spec: FieldSpec) -> str:
    doc, default = spec.doc, PRESETS["tiny"].get(spec.name, spec.default)
    if spec.name == "model":
        doc += " One of: " + ", ".join(PRESETS) + "."
    if isinstance(default, bool):
        doc += f" (default: {'on' if default else 'off'})"
    elif isinstance(default, int | float) and (default != 0 or "0:" not in doc):
        doc += f" (default: {default:g})"
    elif default and isinstance(default, str):
        doc += f" (default: {default})"
    return doc.replace("%", "%%")


def _convert(spec: FieldSpec, value: Any) -> Any:
    """Text of a flag, or a value of a file, as the field's type.

    Raises:
        ValueError: the value does not fit; the message says what was expected.
    """
    if _is_bool(spec):
        text = str(value).lower()
        if text not in ("true", "false"):
            raise ValueError("expected true or false")
        return text == "true"
    if spec.type is int:
        return _whole_number(value)
    if spec.type is float:
        if isinstance(value, bool):
            raise ValueError("expected a number")
        try:
            return float(value)
        except (TypeError, ValueError):
            raise ValueError("expected a number") from None
    if spec.type is str:
        if not isinstance(value, str):
            raise ValueError("expected text")
        if spec.choices and value not in spec.choices:
            raise ValueError(f"expected one of {', '.join(spec.choices)}")
        return value
    if not isinstance(value, str | list):
        raise ValueError("expected whole numbers separated by commas, as in 9,7")
    parts: Iterable[Any] = value.split(",") if isinstance(value, str) else value
    return tuple(_whole_number(part) for part in parts)


def _whole_number(value: Any) -> int:
    """An int from 32, "32", "2e9" or "1_000_000"."""
    if isinstance(value, bool):
        raise ValueError("expected a whole number")
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
    try:
        number = float(value) if not isinstance(value, int) else value
        if number == int(number):
            return int(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError("expected a whole number")


def _is_bool(spec: FieldSpec) -> bool:
    return spec.type is bool or get_args(spec.type) == (bool, NoneType)


def _suggest(word: str, known: Iterable[str], *, every: bool = False) -> str:
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; there are {', '.join(known)}" if every else "; see --help"
