"""What `--data` names, decided from the file system alone. No torch or numpy import."""

from __future__ import annotations

import os
import stat
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path

from megalite.config_data import DataConfig
from megalite.reading.inputs import dataset_prefix, kind_of, missing_packages

_NOT_TEXT = frozenset(
    {".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".arrow", ".npy", ".pt", ".safetensors"}
)


@dataclass(frozen=True)
class Source:
    """Where tokens come from.

    Attributes:
        kind: "stdlib" (the embedded default), "text", "records" (JSON Lines, packed or not, or
            parquet), "indexed" or "mock".
        path: the file, the folder of the standard library, or the prefix of .bin/.idx.
    """

    kind: str
    path: Path


@dataclass(frozen=True)
class Ingredient:
    """One dataset of a blend, as it was named.

    Attributes:
        weight: None: by its size.
        data: the configuration with this dataset alone.
    """

    weight: float | None
    data: DataConfig


def train_ingredients(data: DataConfig) -> tuple[Ingredient, ...]:
    """What is trained on; one without words is the embedded corpus, or random tokens."""
    return _ingredients(data, data.train_data_path or data.data)


def valid_ingredients(data: DataConfig) -> tuple[Ingredient, ...]:
    """What is validated on; none if it is a share of what is trained on."""
    return _ingredients(data, data.valid_data_path) if data.valid_data_path else ()


def test_ingredients(data: DataConfig) -> tuple[Ingredient, ...]:
    """What is tested on after training; none if it is a share of what is trained on, or nothing."""
    return _ingredients(data, data.test_data_path) if data.test_data_path else ()


def _ingredients(data: DataConfig, words: Sequence[str]) -> tuple[Ingredient, ...]:
    """Words as Megatron-LM reads them: pairs if every other one is a number, else paths."""
    weights: Sequence[float | None] = [_number(word) for word in words[::2]]
    paths = words[1::2]
    if len(words) % 2 or None in weights or not words:
        weights, paths = [None] * len(words), words
    alone = replace(data, data=(), train_data_path=(), valid_data_path=(), test_data_path=())
    if not words:
        return (Ingredient(None, alone),)
    return tuple(
        Ingredient(weight, replace(alone, data=(path,)))
        for weight, path in zip(weights, paths, strict=True)
    )


def find_source(data: DataConfig) -> Source:
    """The source that the configuration of one dataset names.

    Whether it can be read is not checked here.
    """
    if data.mock_data:
        return Source("mock", Path())
    if not data.data:
        return Source("stdlib", Path(sysconfig.get_paths()["stdlib"]))
    (name,) = data.data
    path = Path(name)
    if (prefix := dataset_prefix(path)) != path:
        return Source("indexed", prefix)
    if _exists(_index_of(path)) or (_exists(_tokens_of(path)) and not _exists(path)):
        return Source("indexed", path)
    is_records = kind_of(path.name)[0] in ("json", "parquet")
    return Source("records" if is_records else "text", path)


def token_texts_known(data: DataConfig) -> bool:
    """Whether tokens can be shown as text, and which one ends a document is known."""
    if data.mock_data:
        return False
    return data.tokenizer_type != "auto" or is_text(data)


def is_text(data: DataConfig) -> bool:
    """Whether everything that is read is text, tokenized here."""
    read = (*train_ingredients(data), *valid_ingredients(data), *test_ingredients(data))
    return all(
        find_source(ingredient.data).kind in ("stdlib", "text", "records") for ingredient in read
    )


def source_problems(data: DataConfig) -> list[str]:
    """Sentences for what is missing, unreadable or no blend."""
    problems = []
    for flag, words, ingredients in (
        ("--data", data.data, train_ingredients(data) if not data.train_data_path else ()),
        ("--train-data-path", data.train_data_path, train_ingredients(data)),
        ("--valid-data-path", data.valid_data_path, valid_ingredients(data)),
        ("--test-data-path", data.test_data_path, test_ingredients(data)),
    ):
        if words or flag == "--data":
            problems += _blend_problems(flag, words, ingredients)
            for ingredient in ingredients:
                problems += _ingredient_problems(flag, ingredient.data)
    return problems


def _blend_problems(
    flag: str, words: Sequence[str], ingredients: Sequence[Ingredient]
) -> list[str]:
    given = f"{flag} {' '.join(words)}"
    if ingredients and ingredients[0].weight is None:
        if len(words) > 1 and any(_number(w) is not None and not _exists(Path(w)) for w in words):
            return [f"{given}: a weight stands before every path or before none, as in 0.7 A 0.3 B"]
        return []
    return [
        f"{given}: weight {ingredient.weight:g} must be above 0"
        for ingredient in ingredients
        if ingredient.weight is not None
        and not (ingredient.weight > 0 and isfinite(ingredient.weight))
    ]


def _ingredient_problems(flag: str, data: DataConfig) -> list[str]:
    source = find_source(data)
    given = f"{flag} {' '.join(data.data)}"
    files: list[Path] = []
    if source.kind == "indexed":
        files = [_tokens_of(source.path), _index_of(source.path)]
    elif source.kind == "text" and source.path.suffix in _NOT_TEXT:
        return [f"{given} is not text: unpack it to a .txt or .jsonl file"]
    elif source.kind in ("text", "records"):
        files = [source.path]
    if source.kind == "records":
        missing = missing_packages(*kind_of(source.path.name))
        if missing:
            return [f"{given}: {need}" for need in missing]
    return [problem for file in files if (problem := _file_problem(file, given))]


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _tokens_of(prefix: Path) -> Path:
    return Path(f"{prefix}.bin")


def _index_of(prefix: Path) -> Path:
    return Path(f"{prefix}.idx")


def _exists(path: Path) -> bool:
    """Whether there is such a file; a name that no file can have is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def _file_problem(file: Path, given: str) -> str | None:
    try:
        status = file.stat()
    except FileNotFoundError:
        return f"{given}: there is no file {file}{_near(file)}"
    except (OSError, ValueError) as error:
        return f"{given}: {file}: {getattr(error, 'strerror', error)}"
    if stat.S_ISDIR(status.st_mode):
        return f"{given} is a folder: give a .txt or .jsonl file, or a .bin/.idx prefix"
    if not os.access(file, os.R_OK):
        return f"{given}: {file} cannot be read (permission denied)"
    if not status.st_size and stat.S_ISREG(status.st_mode):
        return f"{given}: {file} is empty"
    return None


def _is_data(path: Path) -> bool:
    kind, compression = kind_of(path.name)
    return path.suffix == ".idx" or (bool(kind) and not (kind == "text" and compression))


def _near(file: Path) -> str:
    """Names of data files beside the missing one."""
    if not file.parent.is_dir():
        return f" (nor a folder {file.parent})"
    try:
        names = sorted(path.name for path in file.parent.iterdir() if _is_data(path))[:4]
    except OSError:  # a folder that may be entered but not listed
        return ""
    return f"; beside it: {', '.join(names)}" if names else ""
