"""What `--input` names: files, folders, globs and standard input, in one fixed order.

The arguments stand in the order given; what a folder or a glob names stands in natural order, in
which `part_2` comes before `part_10`. So the order depends neither on the file system nor on how
many workers there are.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

STANDARD_INPUT = "-"

KINDS: Mapping[str, str] = MappingProxyType(
    {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}
)
"""What a file holds, by its name. A .json is read as JSON Lines, as Megatron-LM reads it."""

COMPRESSIONS: Mapping[str, str] = MappingProxyType({".gz": "gzip", ".zst": "zstd"})

_PACKAGES: Mapping[str, str] = MappingProxyType({"zstd": "zstandard", "parquet": "pyarrow"})


@dataclass(frozen=True)
class Input:
    """One file to read.

    Attributes:
        path: as it was named, or found; "-" for standard input.
        kind: "json" (JSON Lines), "text" or "parquet".
        compression: "", "gzip" or "zstd".
        size: bytes on the disk; 0 for standard input.
        changed_ns: when it was last written.
    """

    path: str
    kind: str
    compression: str = ""
    size: int = 0
    changed_ns: int = 0


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorts digits as the numbers they write: part_2 before part_10, part_02 beside part_2."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(part), part) if part[0] in "0123456789" else (1, 0, part) for part in parts]


def find_inputs(given: Sequence[str]) -> tuple[list[Input], list[str]]:
    """The files to read, and a sentence for each argument that names none.

    Args:
        given: files, folders (all files of a known kind in and below them, hidden ones left out),
            globs, or "-" for standard input.
    """
    found: list[Input] = []
    problems: list[str] = []
    for argument in given:
        if argument == STANDARD_INPUT:
            found.append(Input(STANDARD_INPUT, "json"))
            continue
        for path in _paths(argument, problems):
            try:
                found.append(_input(path))
            except ValueError as error:
                problems.append(f"--input {argument}: {error}")
    seen: set[str] = set()
    for each in found:
        real = os.path.realpath(each.path)
        if real in seen:
            problems.append(f"--input: {each.path} is named twice")
        seen.add(real)
    needs = {need for each in found for need in missing_packages(each.kind, each.compression)}
    return found, problems + [f"--input: {need}" for need in sorted(needs)]


def missing_packages(kind: str, compression: str) -> list[str]:
    """Sentences about packages that such a file needs and that are not installed."""
    needs = {need: _PACKAGES[need] for need in (kind, compression) if need in _PACKAGES}
    return [
        f"{need} files need the package {package}: pip install 'megalite[data]'"
        for need, package in needs.items()
        if not find_spec(package)
    ]


def dataset_prefix(path: Path) -> Path:
    """The prefix of a dataset that one of its files names; any other path as it is."""
    if path.suffix in (".bin", ".idx") or is_sidecar(path):
        return path.with_suffix("")
    return path


def is_sidecar(path: Path) -> bool:
    """Whether a file describes the .bin/.idx beside it, and is no text."""
    return path.suffix == ".json" and all(
        os.path.isfile(path.with_suffix(suffix)) for suffix in (".bin", ".idx")
    )


def _paths(argument: str, problems: list[str]) -> list[str]:
    """Files that an argument names; says so if there are none."""
    if os.path.isdir(argument):
        paths = sorted(_below(argument), key=natural_key)
        if not paths:
            problems.append(f"--input {argument}: the folder holds no {_known()}")
        return paths
    if os.path.lexists(argument):
        return [argument]
    paths = sorted(glob.glob(argument, recursive=True), key=natural_key)
    paths = [path for path in paths if not os.path.isdir(path) and not is_sidecar(Path(path))]
    if not paths:
        what = "matches no file" if glob.has_magic(argument) else "there is no such file"
        problems.append(f"--input {argument}: {what}{_near(Path(argument))}")
    return paths


def _below(folder: str) -> Iterator[str]:
    for place, folders, names in os.walk(folder):
        # What preprocessing has written here, or not completed, is no input of it.
        folders[:] = [name for name in folders if not name.startswith(".")]
        folders[:] = [name for name in folders if not name.endswith(".partial")]
        for name in names:
            path = os.path.join(place, name)
            if kind_of(name)[0] and not name.startswith(".") and not is_sidecar(Path(path)):
                yield path


def kind_of(name: str) -> tuple[str, str]:
    """What a file of this name holds and how it is packed, as in `Input`; "" if not known."""
    stem, suffix = os.path.splitext(name)
    compression = COMPRESSIONS.get(suffix, "")
    if compression:
        suffix = os.path.splitext(stem)[1]
    kind = KINDS.get(suffix, "")
    return ("", "") if compression and kind == "parquet" else (kind, compression)


def _input(path: str) -> Input:
    kind, compression = kind_of(path)
    if not kind:
        raise ValueError(f"{path} is no {_known()}")
    if is_sidecar(Path(path)):
        raise ValueError(f"{path} describes the .bin and .idx beside it, and is no text")
    try:
        status = os.stat(path)
        if not os.access(path, os.R_OK):
            raise ValueError(f"{path} cannot be read (permission denied)")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    return Input(path, kind, compression, status.st_size, status.st_mtime_ns)


def _known() -> str:
    *others, last = KINDS
    return f"{', '.join(others)} or {last} file (the first three also .gz or .zst)"


def _near(path: Path) -> str:
    """Names of readable files beside the missing one."""
    try:
        names = [each.name for each in path.parent.iterdir() if kind_of(each.name)[0]]
    except OSError:
        return f" (nor a folder {path.parent})"
    names = sorted(names, key=natural_key)[:4]
    return f"; beside it: {', '.join(names)}" if names else ""
