"""The first columns of the benchmarks' CSVs: when, of which code, on what."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path


def surroundings(of_commit: str | None, device: str) -> dict[str, str]:
    """Date, commit, device and torch's version.

    Args:
        of_commit: None: of this checkout.
        device: in words.
    """
    import torch

    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "commit": of_commit or commit(),
        "device": device,
        "torch": torch.__version__,
    }


def devices(kind: str, count: int = 0) -> str:
    """`2 x NVIDIA H200`, or the name alone.

    Args:
        kind: `cuda` or `cpu`.
        count: of ranks, each with its own if they are GPUs; 0: not told.
    """
    import torch

    name = torch.cuda.get_device_name(0) if kind == "cuda" else "CPU"
    return f"{count} x {name}" if count else name


def commit() -> str:
    """Of the checkout that this file is in; "unknown" if there is none."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
