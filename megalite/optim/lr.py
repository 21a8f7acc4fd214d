"""The learning rate as a function of the step. No torch import."""

from __future__ import annotations

import math

from megalite.config import TrainConfig


def learning_rate(train: TrainConfig, step: int) -> float:
    """Learning rate of optimizer step `step`, 0 first.

    It rises linearly to `lr` over the warm-up, whose first step already has lr / warm-up steps, and
    falls to `min_lr` at `lr_decay_steps`, along a cosine, a line, or, for WSD (warm-up, stable,
    decay; Hu et al., "MiniCPM", arXiv:2404.06395), a line over the last `lr_wsd_decay_steps`.
    """
    if step < train.lr_warmup_steps:
        return train.lr * (step + 1) / train.lr_warmup_steps
    span = max(1, train.lr_decay_steps - train.lr_warmup_steps)
    done = min(1.0, (step - train.lr_warmup_steps) / span)
    match train.lr_decay_style:
        case "constant":
            share = 1.0
        case "linear":
            share = 1.0 - done
        case "cosine":
            share = 0.5 * (1.0 + math.cos(math.pi * done))
        case _:
            left = train.lr_decay_steps - step
            share = min(1.0, max(0.0, left / max(1, train.lr_wsd_decay_steps)))
    return train.min_lr + (train.lr - train.min_lr) * share
