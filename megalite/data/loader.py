"""Which samples are in the batches of one data rank, by a formula. Nothing is broadcast.

While a step runs, a thread makes the next batch ready in the host's memory; see `host_batch`.

Sample j of a step's global batch goes to micro-batch m, data rank r, row b with
j = (m dp + r) micro_batch_size + b, as in Megatron-LM: the set of samples of a step does not depend
on the layout.

Legend: M micro-batches, B samples of each, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from megalite.config import Config
from megalite.data.host_batch import Batch, BatchReader, StackedBatch
from megalite.data.samples import PADDING, Samples
from megalite.layers.batch import Documents
from megalite.parallel.data import DataGroup


class Loader:
    """Reads the samples of any step; what comes next is read ahead.

    What the thread of the reader raises is raised by the method that hands out the batch.

    Args:
        config: the run.
        train, valid: the splits' samples.
        dp: the data group.
        device: where the batches go, a GPU with its number.
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
        self._reader = BatchReader(config, device)
        # Its thread ends when the Loader is gone, since nothing in it refers back to the Loader
        # once a batch is read. Python's exit waits for the batch being read: a thread that is cut
        # off inside torch, as a daemon is, would bring the process down.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._ahead: tuple[int, Future[StackedBatch]] | None = None

    def train_batch(self, step: int) -> Batch:
        """The batch of optimizer step `step`, 0 first."""
        train = self._config.train
        if self._ahead is not None and self._ahead[0] == step:
            now = self._ahead[1]
        else:
            now = self._thread.submit(self.read_step, step)
        self._ahead = None
        if step + 1 < train.steps:
            self._ahead = (step + 1, self._thread.submit(self.read_step, step + 1))
        batch = now.result().on(self._device).split(train.seed, step)
        if train.reverse_micro_batches:
            return replace(batch, micro_batches=batch.micro_batches[::-1])
        return batch

    def read_step(self, step: int) -> StackedBatch:
        """The batch of a step in the host's memory: what the reader's thread does for it."""
        sizes = self._config.batch_sizes
        numbers = self._own_numbers(sizes.size(step))
        samples = self._train.order(sizes.consumed(step) + numbers)
        return self._reader.read(self._train, samples, numbers)

    def validation_batches(self) -> Iterator[Batch]:
        """The batches of a validation; see `evaluation_batches`."""
        return self.evaluation_batches(self._valid)

    def evaluation_batches(self, split: Samples) -> Iterator[Batch]:
        """Samples from all over a split, always the same ones for a seed.

        If the split is shorter than `eval_steps` batches it is used once; rows without a sample
        have an empty mask.
        """
        train = self._config.train
        available = min(train.eval_steps * train.global_batch_size, split.num_samples)
        reads = (
            self._thread.submit(self._read_evaluation, split, first, available)
            for first in range(0, available, train.global_batch_size)
        )
        ahead = next(reads, None)
        while ahead is not None:
            now, ahead = ahead, next(reads, None)
            yield now.result().on(self._device).split(train.seed, None)

    def _read_evaluation(self, split: Samples, first: int, available: int) -> StackedBatch:
        """The batch from place `first` on, of a split of which `available` samples are used."""
        numbers = self._own_numbers(self._config.train.global_batch_size)
        places = first + numbers
        exists = places < available
        order = split.order(np.where(exists, places, 0))
        return self._reader.read(split, np.where(exists, order, -1), numbers)

    def prompt(self, length: int) -> list[int]:
        """The first tokens of the validation samples, or of the training ones if there are none."""
        samples = self._valid if self._valid.num_samples else self._train
        tokens = samples.read(0)
        return tokens[tokens != PADDING][:length].tolist()

    def _own_numbers(self, size: int) -> np.ndarray:
        """Numbers j of this rank's samples in a global batch, int64 [M, B]."""
        rows = self._config.train.micro_batch_size
        count = size // (rows * self._dp.size)
        micro_batch, row = np.arange(count)[:, None], np.arange(rows)[None, :]
        return (micro_batch * self._dp.size + self._dp.rank) * rows + row

    def documents(self, tokens: np.ndarray) -> Documents | None:
        """Of the inputs of a micro-batch, int64 [B, S]; None if nothing depends on them."""
        stacked = self._reader.documents(tokens[None])
        if stacked is None:
            return None
        return stacked.each(lambda tensor: tensor.to(self._device)).split()[0]
