"""Rules about what is saved and loaded. One part of `megalite.check`; no torch import."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megalite.config import Config
from megalite.resume import unknown_changes


def checkpoints(config: Config) -> Iterator[str]:
    """Folders can be used, and what may change is known."""
    options = config.checkpoint
    for flag, folder in (("--save", options.save), ("--load", options.load)):
        if folder and Path(folder).exists() and not Path(folder).is_dir():
            yield f"{flag} {folder} is no folder; choose another one"
    if options.load and not Path(options.load).exists():
        yield f"--load {options.load} does not exist"
    if options.finetune and not options.load_optim:
        yield "--finetune takes no optimizer's states anyway; leave --no-load-optim out"
    yield from unknown_changes(config)
