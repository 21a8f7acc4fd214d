"""What a layout of the examples sets: `MEGALITE_KERNELS=torch --tp 2`."""

from __future__ import annotations


def words_and_settings(layout: str) -> tuple[list[str], dict[str, str]]:
    """The flags of a layout with their values, and what it sets in the environment."""
    words = layout.split()
    settings = dict(w.split("=", 1) for w in words if "=" in w and not w.startswith("-"))
    return [w for w in words if w.startswith("-") or "=" not in w], settings
