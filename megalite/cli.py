"""The command line: generated from `megalite.config`, merged as preset < what
`--init-from` says of the model < file < flags.

All problems of a command are collected; `megalite.check` adds those of the values and reports them
together. No torch import.
"""

from __future__ import annotations

import argparse
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megalite.alternatives import ALTERNATIVES, both_given, has_effect
from megalite.config import Config, FieldSpec, fields
from megalite.config_file import read_file
from megalite.field_values import (
    Problems,
    closest,
    convert,
    is_bool,
    is_words,
    suggest,
    takes_many,
)
from megalite.megatron_flags import (
    MEGATRON_FLAGS,
    MEGATRON_VALUES,
    Alias,
    Always,
    Follows,
    Refused,
    With,
)
from megalite.model_values import imported_values, starting_values
from megalite.presets import PRESETS

_TITLES: Mapping[str, str] = MappingProxyType(
    {
        "model": "model",
        "parallel": "layout",
        "train": "training",
        "parameters": "parameters by name",
        "scaling": "loss scale",
        "data": "data",
        "checkpoint": "checkpoints, weights in and out",
        "supervision": "supervision",
        "run": "run",
    }
)


@dataclass(frozen=True)
class Command:
    """A parsed command line.

    Attributes:
        config: preset, file and flags merged; derived values are still open.
        switches: of the program's own that were given, as `--dry-run`.
        problems: what is wrong with the words: unknown, misused or contradicting flags, a file that
            cannot be read, values of the wrong type.
        unread: fields that somebody meant to set, but whose values a problem left open.
        given: fields that flags set, each with the words that did: `--lr 0.1`.
    """

    config: Config
    switches: frozenset[str] = frozenset()
    problems: tuple[str, ...] = ()
    unread: frozenset[str] = frozenset()
    given: Mapping[str, str] = field(default_factory=dict)


def parse(
    argv: Sequence[str], *, prog: str, description: str, switches: Mapping[str, str]
) -> Command:
    """Parse flags and the file they may name; what is wrong with them is in the result.

    Args:
        argv: words of the command line.
        prog, description: of the program, for its help.
        switches: flags of its own, without a value, with their help.

    Raises:
        SystemExit: after printing `--help`.
    """
    if "-h" in argv or "--help" in argv:
        _help_parser(prog, description, switches).print_help()
        raise SystemExit(0)
    problems = Problems()
    words = _scan(argv, switches, problems)
    specs = {spec.name: spec for spec in fields()}
    flags, given = _flag_values(words, specs, problems)
    file: dict[str, Any] = {}
    is_whole = False
    if "--config" in words:
        path = Path(words["--config"][0])
        file, is_whole = read_file(path, specs, problems)
        if is_whole and flags.get("model", file.get("model")) != file.get("model"):
            problems.add(
                f"--model {flags['model']}: {path} holds every value of a run of "
                f"{file.get('model')}, and a file goes before a preset; give one of them",
                *specs,
            )
    said = flags if is_whole else {**file, **flags}
    folder = said.get("init_from", "")
    imported = imported_values(folder, said, given, problems, specs) if folder else {}
    model = {**file, **flags}.get("model", folder or specs["model"].default)
    start = {} if is_whole else starting_values(model, folder, problems, specs)
    # A file that holds every value holds those of another model, too.
    below = (file, imported) if is_whole else (imported, file)
    values: dict[str, Any] = {}
    for layer in (start, {"model": model}, *below, flags):
        _lay_over(values, layer)
    config = _with_following(Config().replace(**values), words, given, problems)
    return Command(
        config=config,
        switches=frozenset(words).intersection(switches),
        problems=tuple(problems.sentences),
        unread=frozenset(problems.unread),
        given=given,
    )


def _scan(
    argv: Sequence[str], switches: Mapping[str, str], problems: Problems
) -> dict[str, list[str]]:
    """The flags given, each with its values. Of a flag given twice the last counts.

    argparse would stop at the first problem; here every word is looked at.
    """
    arities = _arities() | dict.fromkeys(switches, 0)
    fields_of = dict.fromkeys(arities, ()) | _fields_of_flags()
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
            problems.add(f"{word!r} stands alone: values follow a flag, as in --data {word}")
        elif flag not in arities:
            meant = fields_of.get(closest(flag, arities) or "", ())
            problems.add(f"unknown flag {flag}{suggest(flag, arities)}", *meant)
            values_that_follow()
        elif arities[flag] == 0:
            if has_value:
                problems.add(f"{flag} takes no value, but is given {value!r}", *fields_of[flag])
            found[flag] = []
        else:
            values = ([value] if has_value else []) + values_that_follow()
            found[flag] = values if arities[flag] is None else values[:1]
            if not values and (arities[flag] == 1 or fields_of[flag]):
                problems.add(f"{flag} needs a value", *fields_of[flag])
                del found[flag]
            elif arities[flag] == 1 and len(values) > 1:
                left_over = " ".join(values[1:])
                problems.add(f"{flag} takes one value; {left_over} is left over", *fields_of[flag])
    return found


def _is_flag(word: str) -> bool:
    """Whether a word is a flag, right or wrong; a negative number is none."""
    return re.match(r"--?[A-Za-z]", word) is not None


def _opposite(flag: str) -> str:
    """--no-x of --x."""
    return "--no-" + flag[2:]


def _arities() -> dict[str, int | None]:
    """How many values each flag takes; None for any number."""
    arities: dict[str, int | None] = {"--config": 1}
    specs = {spec.name: spec for spec in fields()}
    for spec in specs.values():
        if is_bool(spec):
            arities |= {spec.flag: 0, _opposite(spec.flag): 0}
        else:
            arities[spec.flag] = None if takes_many(spec) else 1
    for flag, meaning in MEGATRON_FLAGS.items():
        assert flag not in arities, f"{flag} is a flag of ours and of the Megatron table"
        match meaning:
            case Refused():
                arities[flag] = None
            case Always(values=()) | With() | Alias(value=str()):
                arities[flag] = 0
            case Alias(field=field) if takes_many(specs[field]):
                arities[flag] = None
            case _:
                arities[flag] = 1
    return arities


def _fields_of_flags() -> dict[str, tuple[str, ...]]:
    """The field that each flag sets, if it sets one."""
    owners: dict[str, tuple[str, ...]] = {}
    for spec in fields():
        owners[spec.flag] = (spec.name,)
        if is_bool(spec):
            owners[_opposite(spec.flag)] = (spec.name,)
    for flag, meaning in MEGATRON_FLAGS.items():
        if isinstance(meaning, Alias | Follows):
            owners[flag] = (meaning.field,)
    return owners


def _flag_values(
    words: Mapping[str, list[str]], specs: Mapping[str, FieldSpec], problems: Problems
) -> tuple[dict[str, Any], dict[str, str]]:
    """Values of the fields that flags set, ours and Megatron-LM's; and the words that set them."""
    by_field: dict[str, dict[str, Any]] = {}
    for flag, name, text in _assignments(words, specs, problems):
        of_text = specs[name].type is str or is_words(specs[name])
        if of_text and not all(part.strip() for part in _parts(text)):
            # "$CORPUS" of a variable that is not set, more often than not.
            problems.add(f"{flag} is given an empty value", name)
            continue
        try:
            by_field.setdefault(name, {})[flag] = convert(specs[name], text)
        except ValueError as error:
            problems.add(f"{flag} {' '.join(_parts(text))}: {error}", name)
    for name, read in by_field.items():
        first, *others = read
        for flag in others:
            if read[flag] != read[first]:
                typed = (_typed(word, words) for word in (first, flag))
                problems.add(f"{' and '.join(typed)} contradict: give one", name)
    for flag, meaning in MEGATRON_FLAGS.items():
        if flag in words and isinstance(meaning, With) and meaning.field not in by_field:
            problems.add(f"{flag} alone is not in megalite: {meaning.why}", meaning.field)
    values = {name: list(read.values())[-1] for name, read in by_field.items() if read}
    given = {name: _typed(list(by_field[name])[-1], words) for name in values}
    for names in both_given(values):
        pair = (next(iter(by_field[name])) for name in names)
        problems.add(f"{' and '.join(pair)} contradict: give one", *names)
    return values, given


def _typed(flag: str, words: Mapping[str, list[str]]) -> str:
    """A flag as it stands on the command line, with its value."""
    return " ".join([flag, *words[flag]])


def _parts(text: str | list[str]) -> list[str]:
    return [text] if isinstance(text, str) else text


def _assignments(
    words: Mapping[str, list[str]], specs: Mapping[str, FieldSpec], problems: Problems
) -> Iterator[tuple[str, str, str | list[str]]]:
    """(flag, field, text) of every flag that sets a field; a list of those that take many words."""

    def text_of(flag: str, field: str) -> str | list[str]:
        return words[flag] if takes_many(specs[field]) else words[flag][0]

    for spec in specs.values():
        if is_bool(spec):
            if spec.flag in words:
                yield spec.flag, spec.name, "true"
            if _opposite(spec.flag) in words:
                yield _opposite(spec.flag), spec.name, "false"
        elif spec.flag in words:
            text, ours = text_of(spec.flag, spec.name), MEGATRON_VALUES.get(spec.flag)
            yield spec.flag, spec.name, ours.get(str(text), text) if ours else text
    for flag, meaning in MEGATRON_FLAGS.items():
        if flag not in words:
            continue
        match meaning:
            case Refused(why=why):
                problems.add(f"{flag} is not in megalite: {why}")
            case Always(why=why, values=values):
                if values and words[flag][0] not in values:
                    problems.add(f"{flag} {words[flag][0]} is not in megalite: {why}")
            case Alias(field=field, value=None):
                yield flag, field, text_of(flag, field)
            case Alias(field=field, value=str(value)):
                yield flag, field, value


def _with_following(
    config: Config, words: Mapping[str, list[str]], given: dict[str, str], problems: Problems
) -> Config:
    """The configuration with the fields whose flags need the others to be known."""
    specs = {spec.name: spec for spec in fields()}
    values: dict[str, Any] = {}
    for flag, meaning in MEGATRON_FLAGS.items():
        if not isinstance(meaning, Follows) or flag not in words:
            continue
        if problems.unread.intersection(meaning.needs):
            problems.unread.add(meaning.field)
            continue
        try:
            value = meaning.of(config, convert(specs[meaning.field], words[flag][0]))
        except ValueError as error:
            problems.add(f"{_typed(flag, words)}: {error}", meaning.field)
            continue
        typed = given.setdefault(meaning.field, _typed(flag, words))
        if typed == _typed(flag, words):
            values[meaning.field] = value
        elif getattr(getattr(config, specs[meaning.field].group), meaning.field) != value:
            problems.add(f"{typed} and {_typed(flag, words)} contradict: give one", meaning.field)
    return config.replace(**values)


def _lay_over(values: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Put a layer over those below it; of two alternatives it takes the other's place there."""
    for pair in ALTERNATIVES:
        for name, other in (pair, pair[::-1]):
            if has_effect(layer, name) and other not in layer:
                values.pop(other, None)
    values.update(layer)


def _help_parser(
    prog: str, description: str, switches: Mapping[str, str]
) -> argparse.ArgumentParser:
    """The flags as argparse lays them out; it only prints the help."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=100),
        epilog="Megatron-LM's long names are accepted where they mean the same: "
        "docs/megatron_flags.md. Values: preset < --init-from < --config file < flags. Defaults "
        "are those of the preset tiny.",
        usage="%(prog)s [flags]",
    )
    parser._optionals.title = "general"
    parser.add_argument("--config", metavar="FILE", help="Read values from a .toml or .json file.")
    for switch, doc in switches.items():
        parser.add_argument(switch, action="store_true", help=doc)
    groups = {group: parser.add_argument_group(title) for group, title in _TITLES.items()}
    for spec in fields():
        extra: dict[str, Any] = {"metavar": spec.metavar or None}
        if is_bool(spec):
            extra = {"action": argparse.BooleanOptionalAction}
        elif spec.choices:
            extra = {"metavar": spec.metavar or "|".join(spec.choices)}
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
