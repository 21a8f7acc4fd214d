"""Runs of `megalite.pretrain`, in this process, in the pool or launched, and what they wrote."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from pool import RankPool
from torch import Tensor

from megalite import pretrain
from megalite.checkpoint.reader import Checkpoint


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        losses, grad_norms: by step.
        valid_losses: by validation.
        weights: whole final weights by name.
        stdout: of rank 0.
    """

    losses: list[float]
    grad_norms: list[float]
    valid_losses: list[float]
    weights: dict[str, Tensor]
    stdout: str


def read_run(folder: Path, stdout: str = "") -> Run:
    """What a run wrote to its folder."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record for record in records if "loss" in record]
    return Run(
        losses=[float(record["loss"]) for record in steps],
        grad_norms=[float(record["grad_norm"]) for record in steps],
        valid_losses=[r["valid_loss"] for r in records if "valid_loss" in r],
        weights=read_weights(folder / "weights"),
        stdout=stdout,
    )


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Whole weights by name, of the newest checkpoint in a folder."""
    checkpoint = Checkpoint.newest(folder)
    names = [name for name in checkpoint.tensors if not name.startswith("optimizer.")]
    return {name: checkpoint.whole(name) for name in names}


def run_in_pool(pool: RankPool, flags: list[str], world_size: int, runs: Path) -> Run:
    """Call the public entry point with the flags on pooled ranks."""
    name = uuid.uuid4().hex
    argv = [*flags, "--runs", str(runs), "--name", name, "--device", "cpu"]
    outcomes = pool.run(world_size, pretrain.main, argv)
    codes = [outcome.value for outcome in outcomes]
    assert codes == [0] * world_size, [outcome.stderr for outcome in outcomes]
    return read_run(runs / name, outcomes[0].stdout)


def launch(
    command: list[str], *, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a command as a user would."""
    return subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(env or {})},
    )


def pretrain_command(*flags: str) -> list[str]:
    """`python -m megalite.pretrain` with flags."""
    return [sys.executable, "-m", "megalite.pretrain", *flags]


SMALL = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 48 --seq-length 32 "
    "--global-batch-size 8 --micro-batch-size 2 --steps 5 --lr 1e-3 --sample-length 0 "
    "--eval-steps 0"
).split()
"""Flags of a run that takes a second."""


def worst(ours: list[float], theirs: list[float]) -> float:
    """Largest relative difference."""
    assert len(ours) == len(theirs) > 0
    return max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))


ROOT = Path(__file__).parents[1]


def load_tool(name: str) -> ModuleType:
    """A script of `tools/` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
