"""Text from the trained model, through the same parallel ranks that trained it."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.layers.batch import MicroBatch
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
        logits = next_token_logits(trainer, context)
        choice = torch.zeros(1, dtype=torch.int64, device=trainer.device)
        if logits is not None:
            shares = (logits.double() / TEMPERATURE).softmax(-1).cumsum(-1)
            key = make_key(config.train.seed, "sampling")
            threshold = uniform(key, torch.tensor([position], device=logits.device))
            choice = torch.searchsorted(shares, threshold).clamp(max=len(shares) - 1)
        tokens.append(int(pp.broadcast(choice, trainer.last_stage_rank)))
    return tokens[len(prompt) :]


@torch.no_grad()
def next_token_logits(trainer: Trainer, tokens: list[int]) -> Tensor | None:
    """Logits of the token after `tokens`, through all pipeline and tensor ranks.

    Args:
        trainer: a trained model.
        tokens: any number from 1 to the sequence length, the same on all ranks.

    Returns:
        [V] on the ranks of the last stage, None on the others. Under sequence parallelism the
        tokens are padded on the right to a multiple of tp, which a causal model does not see.
    """
    tp = trainer.groups.tp
    trainer.groups.activity.begin("generating text")
    trainer.optimizer.validate()
    last = len(tokens) - 1
    padding = -len(tokens) % (tp.size if tp.sequence_parallel else 1)
    row = torch.tensor([tokens + [0] * padding])
    documents = trainer.loader.documents(row.numpy())
    row = row.to(trainer.device)
    mask = torch.ones_like(row, dtype=torch.bool)
    micro_batch = MicroBatch(row, row, mask, documents=documents)

    def head(logits: Tensor, _: MicroBatch) -> Tensor:
        return tp.start_all_gather(logits[last, 0]).wait()

    results = trainer.executor.run(trainer.programs.evaluating(1), [micro_batch], head)
    return results[0][: trainer.config.model.vocab_size] if results else None
