"""A field of a configuration with what its flag says of it."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, doc: str, *, metavar: str = "", choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with the line that `--help` shows. The unit stands in `metavar`."""
    return field(default=default, metadata={"doc": doc, "metavar": metavar, "choices": choices})
