"""Batches of one data rank, from the formula of the order. Nothing is broadcast.

Sample j of a step's global batch goes to micro-batch m, data rank r, row b with
j = (m dp + r) micro_batch_size + b, as in Megatron-LM: the set of samples of a step does not depend
on the layout.

Legend: B micro-batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megalite.config import Config
from megalite.data.samples import Samples, sample_order
from megalite.layers.batch import DropoutPlace, MicroBatch
from megalite.parallel.data import DataGroup
from megalite.tokenizer.choose import open_tokenizer


@dataclass(frozen=True)
class Batch:
    """One data rank's part of a global batch.

    Attributes:
        micro_batches: in the order in which they run.
        counted_tokens: True places of all their masks.
    """

    micro_batches: tuple[MicroBatch, ...]
    counted_tokens: int


class Loader:
    """Reads the samples of any step.

    Args:
        config: the run.
        train, valid: the splits' samples.
        dp: the data group.
        device: where the batches go.
    """

    def __init__(
        self,
        config: Config,
        train: Samples,
        valid: Samples,
        dp: DataGroup,
        device: torch.device,
    ):
        self._config, self._dp, self._device = config, dp, device
        self._train, self._valid = train, valid
        self._eod = open_tokenizer(config.data, config.model.vocab_size).eod

    def train_batch(self, step: int) -> Batch:
        """The batch of optimizer step `step`, 0 first."""
        train = self._config.train
        numbers = self._own_numbers()
        places = step * train.global_batch_size + numbers
        samples = sample_order(places, self._train.num_samples, train.seed)
        batch = self._load(self._train, samples, numbers, step)
        if train.reverse_micro_batches:
            return Batch(batch.micro_batches[::-1], batch.counted_tokens)
        return batch

    def validation_batches(self) -> Iterator[Batch]:
        """Samples from all over the validation split, always the same ones for a seed.

        If the split is shorter than `eval_steps` batches it is used once; rows without a sample
        have an empty mask.
        """
        train = self._config.train
        wanted = train.eval_steps * train.global_batch_size
        available = min(wanted, self._valid.num_samples)
        for first in range(0, available, train.global_batch_size):
            numbers = self._own_numbers()
            places = first + numbers
            exists = places < available
            order = sample_order(np.where(exists, places, 0), self._valid.num_samples, train.seed)
            samples = np.where(exists, order, -1)
            yield self._load(self._valid, samples, numbers, None)

    def prompt(self, length: int) -> list[int]:
        """The first tokens of the validation samples, or of the training ones if there are none."""
        samples = self._valid if self._valid.num_samples else self._train
        return samples.read(0)[:length].tolist()

    def _own_numbers(self) -> np.ndarray:
        """Numbers j of this rank's samples in a global batch, int64 [micro-batches, B]."""
        config = self._config
        count, rows = config.num_micro_batches, config.train.micro_batch_size
        micro_batch, row = np.arange(count)[:, None], np.arange(rows)[None, :]
        return (micro_batch * self._dp.size + self._dp.rank) * rows + row

    def _load(
        self, split: Samples, samples: np.ndarray, numbers: np.ndarray, step: int | None
    ) -> Batch:
        """Samples [micro-batches, B] (-1: none) as tensors on the device."""
        length = self._config.model.seq_length
        tokens = np.zeros((*samples.shape, length + 1), np.int64)
        for place in np.ndindex(samples.shape):
            if samples[place] >= 0:
                tokens[place] = split.read(int(samples[place]))
        mask = np.broadcast_to(samples[..., None] >= 0, (*samples.shape, length))
        if self._config.data.eod_mask_loss:
            mask = mask & (tokens[..., :-1] != self._eod)
        on_device = self._to_device(tokens)
        mask_on_device = self._to_device(np.ascontiguousarray(mask))
        numbers_on_device = self._to_device(numbers)
        seed = self._config.train.seed
        micro_batches = tuple(
            MicroBatch(
                tokens=on_device[i, :, :-1],
                labels=on_device[i, :, 1:],
                mask=mask_on_device[i],
                place=None if step is None else DropoutPlace(seed, step, numbers_on_device[i]),
            )
            for i in range(len(samples))
        )
        return Batch(micro_batches, int(mask.sum()))

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cuda":
            # From pinned memory the copy does not make the host wait.
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)
