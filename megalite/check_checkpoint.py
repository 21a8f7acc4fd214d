"""Rules about what is saved and loaded. One part of `megalite.check`; no torch import."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from megalite.config import Config
from megalite.resume import unknown_changes


def checkpoints(config: Config) -> Iterator[str]:
    """Folders can be used, and what may change is known."""
    options = config.checkpoint
    if options.load and Path(options.load).is_file():
        yield f"--load {options.load} is no folder"
    if options.save and (wrong := _unusable(Path(options.save))):
        yield f"--save {options.save}: {wrong}; choose another folder"
    if options.load and not Path(options.load).exists():
        yield f"--load {options.load} does not exist"
    if options.finetune and not options.load_optim:
        yield "--finetune takes no optimizer's states anyway; leave --no-load-optim out"
    yield from unknown_changes(config)


def _unusable(folder: Path) -> str:
    """Why nothing can be written to a folder, which need not exist; empty: it can."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        return f"{there} is no folder"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"{there} may not be written to"
