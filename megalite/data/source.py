"""What `--data` names, decided from the file system alone. No torch or numpy import."""

from __future__ import annotations

import os
import stat
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from megalite.config import DataConfig

_NOT_TEXT = frozenset(
    {
        ".gz",
        ".zst",
        ".xz",
        ".bz2",
        ".zip",
        ".tar",
        ".parquet",
        ".arrow",
        ".npy",
        ".pt",
        ".safetensors",
    }
)


@dataclass(frozen=True)
class Source:
    """Where tokens come from.

    Attributes:
        kind: "stdlib" (the embedded default), "text", "jsonl", "indexed" or "mock".
        path: the file, the folder of the standard library, or the prefix of .bin/.idx.
    """

    kind: str
    path: Path


def find_source(data: DataConfig) -> Source:
    """The source that the configuration names; whether it can be read is not checked here."""
    if data.mock_data:
        return Source("mock", Path())
    if not data.data:
        return Source("stdlib", Path(sysconfig.get_paths()["stdlib"]))
    path = Path(data.data)
    if path.suffix in (".bin", ".idx"):
        return Source("indexed", path.with_suffix(""))
    if _exists(_index_of(path)) or (_exists(_tokens_of(path)) and not _exists(path)):
        return Source("indexed", path)
    if path.suffix in (".jsonl", ".json"):
        return Source("jsonl", path)
    return Source("text", path)


def token_texts_known(data: DataConfig) -> bool:
    """Whether tokens can be shown as text, and which one ends a document is known."""
    if find_source(data).kind == "indexed":
        return data.tokenizer_type != "auto"
    return not data.mock_data


def source_problems(data: DataConfig) -> tuple[list[str], bool]:
    """Sentences for what is missing or unreadable, and whether the source is text."""
    source = find_source(data)
    is_text = source.kind in ("stdlib", "text", "jsonl")
    files: list[Path] = []
    if source.kind == "indexed":
        files = [_tokens_of(source.path), _index_of(source.path)]
    elif source.path.suffix in _NOT_TEXT:
        return [f"--data {data.data} is not text: unpack it to a .txt or .jsonl file"], True
    elif source.kind in ("text", "jsonl"):
        files = [source.path]
    problems = [problem for file in files if (problem := _file_problem(file, data.data))]
    return problems, is_text


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
        return f"--data {given}: there is no file {file}{_near(file)}"
    except (OSError, ValueError) as error:
        return f"--data {given}: {file}: {getattr(error, 'strerror', error)}"
    if stat.S_ISDIR(status.st_mode):
        return f"--data {given} is a folder: give a .txt or .jsonl file, or a .bin/.idx prefix"
    if not os.access(file, os.R_OK):
        return f"--data {given}: {file} cannot be read (permission denied)"
    if not status.st_size and stat.S_ISREG(status.st_mode):
        return f"--data {given}: {file} is empty"
    return None


def _near(file: Path) -> str:
    """Names of data files beside the missing one."""
    if not file.parent.is_dir():
        return f" (nor a folder {file.parent})"
    suffixes = (".txt", ".jsonl", ".idx")
    try:
        names = sorted(p.name for p in file.parent.iterdir() if p.suffix in suffixes)[:4]
    except OSError:  # a folder that may be entered but not listed
        return ""
    return f"; beside it: {', '.join(names)}" if names else ""
