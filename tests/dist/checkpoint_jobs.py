"""Jobs of ranks that save and load; see `test_checkpoints.py`."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from worlds import make_trainer

from megalite.checkpoint.reader import Checkpoint
from megalite.checkpoint.saver import Saver
from megalite.checkpoint.state import load_optimizer, load_weights, saved_parts, start_from_weights
from megalite.trainer import Trainer


def own_saver(path: Path, **options: object) -> Saver:
    """A saver of this rank of the pool's world."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store: dist.Store = dist.HashStore()
    if size > 1:
        store = dist.PrefixStore("saver", dist.distributed_c10d._get_default_store().clone())
    return Saver(path, rank, size, store, torch.device("cpu"), 60.0, **options)


def save_weights(trainer: Trainer, path: Path) -> None:
    """Weights alone, as they are."""
    saver = own_saver(path)
    saver.start(0, list(saved_parts(trainer.flat, None, trainer.groups)), {}, 0, 0)
    saver.finish(is_last=True)


def train_and_save(path: Path, steps: int, **values: object) -> int:
    """Train a few steps and save; returns the bytes written by all ranks."""
    trainer = make_trainer(**values)
    for step in range(steps):
        trainer.train_step(step)
    trainer.optimizer.validate()
    saver = own_saver(path)
    parts = list(saved_parts(trainer.flat, trainer.optimizer, trainer.groups))
    saver.start(steps, parts, {}, samples=8 * steps, tokens=128 * steps)
    saved = saver.finish(is_last=True)
    assert saved is not None and not saved.problem
    return saved.num_bytes


def load_and_save(source: Path, path: Path, **values: object) -> int:
    """Load into another layout, and save from it at once."""
    trainer = make_trainer(**values)
    checkpoint = Checkpoint.open(source)
    load_into(trainer, checkpoint)
    saver = own_saver(path)
    parts = list(saved_parts(trainer.flat, trainer.optimizer, trainer.groups))
    saver.start(checkpoint.manifest.step, parts, {}, samples=0, tokens=0)
    saved = saver.finish(is_last=True)
    assert saved is not None and not saved.problem
    return saved.num_bytes


def load_into(trainer: Trainer, checkpoint: Checkpoint, *, optimizer: bool = True) -> None:
    """Weights and states of a trainer from a checkpoint."""
    load_weights(trainer.flat, checkpoint)
    if optimizer:
        load_optimizer(trainer.flat, trainer.optimizer, checkpoint)
    else:
        start_from_weights(trainer.flat, trainer.optimizer, checkpoint)
    trainer.flat.wait_for_parameters()


def contents(folder: Path) -> dict[str, Tensor]:
    """Every whole tensor of a checkpoint."""
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.whole(name) for name in checkpoint.tensors}
