"""The command line: generated from `megalite.config`, merged as preset < file < flags.

All problems of a command are collected and raised together as one `ConfigError`.
No torch import.
"""

from __future__ import annotations

import argparse
import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, NoReturn, get_args

from megalite.config import Config, FieldSpec, fields
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
        explicit: names of the fields that flags set.
        dry_run: describe the run and start nothing.
        print_config: print the resolved configuration and start nothing.
    """

    config: Config
    explicit: frozenset[str]
    dry_run: bool
    print_config: bool


def parse(argv: Sequence[str], *, prog: str, description: str) -> Command:
    """Parse flags and the file they may name.

    Raises:
        ConfigError: unknown or misused flags, unreadable file, values of the wrong type.
        SystemExit: after printing `--help`.
    """
    problems: list[str] = []
    parser = _build_parser(prog, description)
    namespace, unknown = parser.parse_known_args(list(argv))
    given = vars(namespace)
    problems += _describe_unknown(unknown)
    specs = {spec.name: spec for spec in fields()}
    texts = {name: given[name] for name in specs if name in given}
    _apply_megatron_flags(given, texts, problems)
    values = {}
    if "config" in given:
        values.update(_read_file(Path(given["config"]), specs, problems))
    for name, text in texts.items():
        _convert_into(values, specs[name], text, specs[name].flag, problems)
    preset = values.get("model", specs["model"].default)
    if preset not in PRESETS:
        problems.append(f"--model {preset} is not a preset{_suggest(preset, PRESETS, every=True)}")
    if problems:
        raise ConfigError(problems)
    return Command(
        config=Config().replace(**{**PRESETS[preset], **values}),
        explicit=frozenset(texts),
        dry_run="dry_run" in given,
        print_config="print_config" in given,
    )


def to_toml(config: Config) -> str:
    """The configuration as a file that `--config` reads."""
    lines = []
    for group, values in config.to_dict().items():
        lines.append(f"[{group}]")
        # TOML has no null; a value that is left open is left out.
        lines += [f"{name} = {json.dumps(v)}" for name, v in values.items() if v is not None]
        lines.append("")
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _build_parser(prog: str, description: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=100),
        epilog="Megatron-LM's long names are accepted where they mean the same: "
        "docs/megatron_flags.md. Values: preset < --config file < flags.",
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
    own = {spec.flag for spec in fields()}
    for flag, meaning in MEGATRON_FLAGS.items():
        assert flag not in own, f"{flag} is a flag of ours and of the Megatron table"
        parser.add_argument(flag, dest=flag, help=argparse.SUPPRESS, **_arity(meaning))
    return parser


def _help(spec: FieldSpec) -> str:
    doc = spec.doc
    if spec.name == "model":
        doc += " One of: " + ", ".join(PRESETS) + "."
    if not _is_bool(spec) and spec.default not in ("", (), 0):
        doc += (
            f" (default: {spec.default:g})" if _is_number(spec) else f" (default: {spec.default})"
        )
    elif isinstance(spec.default, bool):
        doc += f" (default: {'on' if spec.default else 'off'})"
    elif spec.default == 0 and "0:" not in spec.doc:
        doc += " (default: 0)"
    return doc.replace("%", "%%")


def _arity(meaning: Alias | Always | Refused) -> dict[str, Any]:
    match meaning:
        case Refused():
            return {"nargs": "*"}
        case Always(values=()):
            return {"action": "store_true"}
        case Alias(value=str()):
            return {"action": "store_true"}
        case _:
            return {}


def _apply_megatron_flags(
    given: Mapping[str, Any], texts: dict[str, Any], problems: list[str]
) -> None:
    for flag, meaning in MEGATRON_FLAGS.items():
        if flag not in given:
            continue
        match meaning:
            case Refused(why=why):
                problems.append(f"{flag} is not in megalite: {why}")
            case Always(why=why, values=values):
                if values and given[flag] not in values:
                    problems.append(f"{flag} {given[flag]} is not in megalite: {why}")
            case Alias(field=name, value=value):
                text = given[flag] if value is None else value
                if name in texts and str(texts[name]).lower() != str(text).lower():
                    problems.append(
                        f"{flag} sets --{name.replace('_', '-')} to {text}, "
                        f"but it is also given as {texts[name]}"
                    )
                texts[name] = text


def _read_file(path: Path, specs: Mapping[str, FieldSpec], problems: list[str]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"--config {path} cannot be read: {getattr(error, 'strerror', error)}")
        return {}
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        problems.append(f"--config {path} is not valid {kind}: {error}")
        return {}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat.update(value)
        else:
            flat[key] = value
    values: dict[str, Any] = {}
    for name, value in flat.items():
        spec = specs.get(name.replace("-", "_"))
        if spec is None:
            problems.append(f"--config {path}: no field {name!r}{_suggest(name, specs)}")
        elif value is not None:
            _convert_into(values, spec, value, f"{path}: {name} =", problems)
    return values


def _convert_into(
    values: dict[str, Any], spec: FieldSpec, value: Any, where: str, problems: list[str]
) -> None:
    try:
        values[spec.name] = _convert(spec, value)
    except ValueError as error:
        problems.append(f"{where} {value}: {error}")


def _convert(spec: FieldSpec, value: Any) -> Any:
    """Text of a flag, or a value of a file, as the field's type."""
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
        text = str(value)
        if spec.choices and text not in spec.choices:
            raise ValueError(f"expected one of {', '.join(spec.choices)}")
        return text
    parts: Iterable[Any] = value.split(",") if isinstance(value, str) else value
    if not isinstance(value, str | list):
        raise ValueError("expected whole numbers separated by commas, as in 9,7")
    return tuple(_whole_number(part) for part in parts)


def _whole_number(value: Any) -> int:
    """An int from 32, "32", "2e9" or "1_000_000"."""
    if isinstance(value, bool):
        raise ValueError("expected a whole number")
    try:
        return int(value) if not isinstance(value, float) else _exact(value)
    except (TypeError, ValueError):
        pass
    try:
        return _exact(float(value))
    except (TypeError, ValueError, OverflowError):
        raise ValueError("expected a whole number") from None


def _exact(number: float) -> int:
    if number != int(number):
        raise ValueError
    return int(number)


def _is_bool(spec: FieldSpec) -> bool:
    return spec.type is bool or get_args(spec.type) == (bool, NoneType)


def _is_number(spec: FieldSpec) -> bool:
    return spec.type in (int, float)


def _describe_unknown(words: Sequence[str]) -> list[str]:
    """One sentence for each word the parser could not place; an unknown flag takes its values."""
    found: list[str] = []
    after_flag = False
    for word in words:
        if word.startswith("-"):
            found.append(_unknown_flag(word))
            after_flag = True
        elif not after_flag:
            found.append(f"{word!r} stands alone: values follow a flag, as in --data {word}")
    return found


def _unknown_flag(word: str) -> str:
    flag = word.split("=")[0]
    known = [spec.flag for spec in fields()] + ["--config", "--dry-run", "--print-config"]
    known += [f"--no-{spec.flag[2:]}" for spec in fields() if _is_bool(spec)]
    known += list(MEGATRON_FLAGS)
    return f"unknown flag {flag}{_suggest(flag, known)}"


def _suggest(word: str, known: Iterable[str], *, every: bool = False) -> str:
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; there are {', '.join(known)}" if every else "; see --help"
