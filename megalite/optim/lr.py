"""The learning rate as a function of the step. No torch import."""

from __future__ import annotations

import math

from megalite.config import TrainConfig


def learning_rate(train: TrainConfig, step: int) -> float:
    """Learning rate of optimizer step `step`, 0 first.

    It rises linearly to `lr` over the warm-up, whose first step already has lr / warm-up steps, and
    falls to `min_lr` at `lr_decay_steps`, along a cosine, a line, or, for WSD (warm-up, stable,
    decay; Hu et al., "MiniCPM", arXiv:2404.06395), over the last `lr_wsd_decay_steps` only. The
    shapes of that decay are Megatron-LM's (`optimizer_param_scheduler.py`).
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
            left = (train.lr_decay_steps - step) / max(1, train.lr_wsd_decay_steps)
            share = _wsd_share(train.lr_wsd_decay_style, 1.0 - min(1.0, max(0.0, left)))
    return train.min_lr + (train.lr - train.min_lr) * share


def _wsd_share(style: str, done: float) -> float:
    """From 1 at the start of WSD's decay (`done` 0) to 0 at its end (`done` 1)."""
    match style:
        case "linear":
            return 1.0 - done
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        case "exponential":
            return 2.0 * 0.5**done - 1.0
        case _:
            return 1.0 - math.sqrt(done)
