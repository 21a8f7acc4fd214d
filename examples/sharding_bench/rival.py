"""torch's own `fully_shard` (FSDP2) over the same model, data, loss and kernels.

As its documentation recommends: fp32 weights sharded layer by layer, gathered and computed with in
bf16, gradients reduced in fp32, fused AdamW, gradients clipped by their global norm.

Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from megalite.data.loader import Loader
from megalite.data.mixture import Mixture
from megalite.data.splits import open_samples
from megalite.layers.shard import initialize
from megalite.models.llama import LlamaStage
from megalite.models.stage import stage_specs
from megalite.optim.lr import learning_rate
from megalite.parallel.launch import Rank


class FullyShardTrainer:
    """Trains as `megalite.trainer.Trainer` does.

    Args:
        rank: with a data axis only.
        mixture: of the run's samples.
        gives_back: weights after each forward, to be gathered again for the backward.
    """

    def __init__(self, rank: Rank, mixture: Mixture, *, gives_back: bool):
        config, device = rank.config, rank.device
        self._config, self._dp = config, rank.groups.dp
        (spec,) = stage_specs(config)
        self._stage = LlamaStage(
            config, spec, tp=rank.groups.tp, dtype=torch.float32, device=device
        )
        initialize(self._stage, config.train.seed)
        mesh = init_device_mesh(device.type, (self._dp.size,))
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        how = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": gives_back}
        for layer in self._stage.layers:
            fully_shard(layer, **how)
        fully_shard(self._stage, **how)
        train = config.train
        self._optimizer = torch.optim.AdamW(
            self._stage.parameters(),
            lr=train.lr,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_eps,
            weight_decay=train.weight_decay,
            fused=True,
        )
        samples = open_samples(config, mixture)
        self._loader = Loader(config, samples[0], samples[1], self._dp, device)

    def train_step(self, step: int) -> Tensor:
        """Returns [norm, loss], as a trainer does."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._config.train, step)
        batch = self._loader.train_batch(step)
        tokens = self._dp.all_reduce(batch.counted_tokens.clone())
        # Its gradients are means over the ranks, ours sums.
        scale = self._dp.size / tokens
        total = torch.zeros((), dtype=torch.float64, device=tokens.device)
        for micro_batch in batch.micro_batches:
            logits = self._stage(micro_batch.tokens, micro_batch.place, micro_batch.documents)
            weights = micro_batch.mask * scale
            loss = self._stage.weighted_loss(logits, micro_batch.labels, weights)
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(
            self._stage.parameters(), self._config.train.clip_grad
        )
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self._optimizer.step()
        self._optimizer.zero_grad()
        loss = self._dp.all_reduce(total) / self._dp.size
        return torch.stack([norm.double(), loss])
