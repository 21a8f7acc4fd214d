"""Rules of --init-from and --export-hf. No torch import."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from megalite.config import Config
from megalite.data.source import is_text
from megalite.tokenizer.hf_files import flags_of, settings_of


def imported(config: Config) -> Iterator[str]:
    """Text for weights that know another tokenizer's numbers would teach them nothing."""
    folder = config.checkpoint.init_from
    if folder and config.checkpoint.load:
        yield f"--init-from {folder} and --load {config.checkpoint.load} contradict: give one"
    if not folder or config.data.mock_data or config.data.tokenizer_type != "auto":
        return
    tokenizer = settings_of(Path(folder))
    if tokenizer and is_text(config.data):
        yield f"--init-from {folder} has a tokenizer of its own: give {flags_of(tokenizer)}"


def exported(config: Config) -> Iterator[str]:
    """The folder is new, and can be made: it would be too late to say so when all is done."""
    if not config.checkpoint.export_hf:
        return
    folder = Path(config.checkpoint.export_hf)
    given = f"--export-hf {folder}"
    if is_taken(folder):
        yield f"{given} exists; choose another name or remove it"
        return
    parent = folder.absolute().parent
    while not os.path.exists(parent):
        parent = parent.parent
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK):
        yield f"{given}: {parent} can't be written to; choose another folder"


def is_taken(folder: Path) -> bool:
    """Whether there is anything of this name but an empty folder."""
    try:
        return os.path.lexists(folder) and bool(os.listdir(folder))
    except OSError:
        return True  # a file, or not ours to look into
