"""Worlds for jobs that test parts below the entry point."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from megalite.config import Config, resolve
from megalite.data.mixture import prepare_mixture
from megalite.data.splits import open_samples
from megalite.parallel.groups import ParallelGroups
from megalite.trainer import Trainer


def make_groups(**values: object) -> ParallelGroups:
    """Groups of the configuration with these fields, on gloo. All ranks of the world call it."""
    config = resolve(Config().replace(**values), int(os.environ["WORLD_SIZE"]))
    return world_groups(config)


def world_groups(config: Config) -> ParallelGroups:
    """Groups of a resolved configuration on the world of this job."""
    if config.world_size == 1:
        return ParallelGroups.solo()
    dist.init_process_group("gloo")
    return ParallelGroups.create(config, torch.device("cpu"))


def random_like(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    """The same values on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def make_trainer(**values: object) -> Trainer:
    """A trainer of a small model on this world; fields as in `Config.replace`."""
    size = int(os.environ["WORLD_SIZE"])
    small = dict(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=48,
        seq_length=16,
        micro_batch_size=2,
        global_batch_size=8,
        steps=4,
        lr=1e-3,
        precision="fp32",
        device="cpu",
    )
    config = resolve(Config().replace(**{**small, **values}), size)
    groups = world_groups(config)
    mixture = prepare_mixture(config.data)
    return Trainer(config, open_samples(config, mixture), groups, torch.device("cpu"))
