"""What `--model` and `--init-from` say of the model. No torch import."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalite.config import FieldSpec
from megalite.errors import ConfigError
from megalite.field_values import Problems, suggest
from megalite.hf_config import SHAPE, read_hf_config
from megalite.presets import LARGE_RUN, PRESETS


def starting_values(
    model: str, init_from: str, problems: Problems, specs: Mapping[str, FieldSpec]
) -> Mapping[str, Any]:
    """The fields that `--model` sets; where `--init-from` stands in its place, it sets the rest.

    Args:
        model: a preset, or a folder with a config.json.
        init_from: the folder, or empty.
        problems: gets what is wrong.
        specs: of all fields, which a problem leaves open.
    """
    if model == init_from:
        return LARGE_RUN
    if model in PRESETS:
        return PRESETS[model]
    if not Path(model).is_dir():
        problems.add(
            f"--model {model} is not a preset{suggest(model, PRESETS, every=True)}", *specs
        )
        return {}
    return {**LARGE_RUN, **_of_folder("--model", model, problems, specs)}


def imported_values(
    folder: str,
    said: Mapping[str, Any],
    given: Mapping[str, str],
    problems: Problems,
    specs: Mapping[str, FieldSpec],
) -> dict[str, Any]:
    """The model's fields of `--init-from`, whose shapes nothing else may change.

    Args:
        folder: with a config.json.
        said: values by field, of flags and a file.
        given: fields that flags set, each with the words that did.
        problems, specs: as of `starting_values`.
    """
    values = _of_folder("--init-from", folder, problems, specs)
    for name in SHAPE:
        if name in said and said[name] != values.get(name, said[name]):
            problems.add(
                f"{given.get(name, f'{name} = {said[name]}')} and --init-from {folder} contradict: "
                f"its config.json says {values[name]}; leave it out",
                name,
            )
    return values


def _of_folder(
    flag: str, folder: str, problems: Problems, specs: Mapping[str, FieldSpec]
) -> dict[str, Any]:
    try:
        return read_hf_config(Path(folder))
    except ConfigError as error:
        for sentence in error.violations:
            problems.add(f"{flag} {folder}: {sentence}", *specs)
        return {}
