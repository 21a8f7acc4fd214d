"""Text from the trained model, through the same parallel ranks that trained it."""

from __future__ import annotations

import torch

from megalite.parallel.rng import make_key, uniform
from megalite.trainer import Trainer

TEMPERATURE = 0.8


def generate(trainer: Trainer, prompt: list[int], count: int) -> list[int]:
    """Sample tokens after a prompt.

    Every rank calls it and gets the same tokens: each data replica computes them alike, the last
    stage draws, and the other stages are told. The draw is a function of (seed, position).

    Args:
        trainer: a trained model.
        prompt: at least one token.
        count: tokens to add.

    Returns:
        The added tokens.
    """
    config, pp = trainer.config, trainer.groups.pp
    tokens = list(prompt)
    for position in range(count):
        context = tokens[-config.model.seq_length :]
        logits = trainer.next_token_logits(context)
        choice = torch.zeros(1, dtype=torch.int64, device=trainer.device)
        if logits is not None:
            shares = (logits.double() / TEMPERATURE).softmax(-1).cumsum(-1)
            key = make_key(config.train.seed, "sampling")
            threshold = uniform(key, torch.tensor([position], device=logits.device))
            choice = torch.searchsorted(shares, threshold).clamp(max=len(shares) - 1)
        tokens.append(int(pp.broadcast(choice, trainer.last_stage_rank)))
    return tokens[len(prompt) :]
