"""Configuration files: TOML and JSON, written with every value and read back. No torch import."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megalite.alternatives import both_given
from megalite.config import Config, FieldSpec, fields
from megalite.errors import ConfigError
from megalite.field_values import Problems, closest, convert, suggest


def to_toml(config: Config) -> str:
    """The configuration as a file that `--config` reads."""
    derived = json.dumps(config.to_saved()["derived"])
    lines = [
        "# These follow from the others and are derived anew when this file is read;",
        "# take a name out to keep its value.",
        f"derived = {derived}",
        "",
    ]
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


def read_file(
    path: Path, specs: Mapping[str, FieldSpec], problems: Problems
) -> tuple[dict[str, Any], bool]:
    """Values by field, and whether the file is a saved configuration, which holds every value."""
    content = _file_content(path)
    if isinstance(content, str):
        problems.add(f"--config {path} {content}", *specs)
        return {}, False
    is_whole = isinstance(content.get("derived"), list)
    derived = {str(name) for name in content.pop("derived")} if is_whole else set()
    for name in sorted(derived - set(specs)):
        problems.add(f"--config {path}: derived: no field {name!r}{suggest(name, specs)}")
    values: dict[str, Any] = {}
    for name, value in _named_values(path, content, problems):
        spec = specs.get(name.replace("-", "_"))
        if spec is None:
            meant = closest(name, specs)
            sentence = f"--config {path}: no field {name!r}{suggest(name, specs)}"
            problems.add(sentence, *([meant] if meant else []))
        elif spec.name in values:
            problems.add(f"--config {path}: {name} is given twice", spec.name)
        elif value is not None and spec.name not in derived:
            try:
                values[spec.name] = convert(spec, value)
            except ValueError as error:
                problems.add(f"--config {path}: {name} = {value}: {error}", spec.name)
    for names in () if is_whole else both_given(values):
        problems.add(f"--config {path}: {' and '.join(names)} contradict: give one", *names)
    return values, is_whole


def read_saved(path: Path) -> Config:
    """A run's `config.json` as it was in use, derived values included.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    content = _file_content(path)
    if isinstance(content, str):
        raise ConfigError(f"{path} {content}")
    return saved_config(path, content)


def saved_config(path: Path, content: Mapping[str, Any]) -> Config:
    """The configuration that a file holds, as `Config.to_saved` gave it.

    Raises:
        ConfigError: it is none; `path` is the file's.
    """
    problems = Problems()
    specs = {spec.name: spec for spec in fields()}
    content = dict(content)
    derived = content.pop("derived", None)
    if not isinstance(derived, list):
        raise ConfigError(f"{path} is not the saved configuration of a run")
    values: dict[str, Any] = {}
    for name, value in _named_values(path, content, problems):
        if name not in specs:
            problems.add(f"{path}: no field {name!r}{suggest(name, specs)}")
        elif value is not None:
            try:
                values[name] = convert(specs[name], value)
            except ValueError as error:
                problems.add(f"{path}: {name} = {value}: {error}")
    if problems.sentences:
        raise ConfigError(problems.sentences)
    return replace(Config().replace(**values), derived=frozenset(map(str, derived)))


def _file_content(path: Path) -> dict[str, Any] | str:
    """What the file holds, or the rest of a sentence that says why it cannot be used."""
    kind = "JSON" if path.suffix == ".json" else "TOML"
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        return f"cannot be read: {getattr(error, 'strerror', error)}"
    except (ValueError, RecursionError) as error:
        return f"is not valid {kind}: {error}"
    if not isinstance(content, dict):
        return "must hold names and values, as --print-config shows"
    return content


def _named_values(
    path: Path, content: Mapping[str, Any], problems: Problems
) -> Iterator[tuple[str, Any]]:
    """The fields of a file, in groups or without."""
    groups = Config().to_dict()
    for name, value in content.items():
        if not isinstance(value, dict):
            yield name, value
        elif name in groups:
            yield from value.items()
        else:
            problems.add(f"--config {path}: no group {name!r}{suggest(name, groups)}")
