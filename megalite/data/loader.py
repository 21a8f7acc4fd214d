"""Batches of one data rank, from the formula of the order. Nothing is broadcast.

While a step runs, a thread reads the samples of the next one.

Sample j of a step's global batch goes to micro-batch m, data rank r, row b with
j = (m dp + r) micro_batch_size + b, as in Megatron-LM: the set of samples of a step does not depend
on the layout.

Legend: B micro-batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megalite.config import Config
from megalite.data.documents import document_bounds, document_starts
from megalite.data.samples import PADDING, Samples
from megalite.layers.batch import Documents, DropoutPlace, MicroBatch
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


@dataclass(frozen=True)
class _Rows:
    """A batch in the host's memory, [micro-batches, B, ...].

    Attributes:
        tokens: int64 [..., S + 1].
        mask: bool [..., S].
        numbers: int64 [...], of the samples in the global batch.
    """

    tokens: np.ndarray
    mask: np.ndarray
    numbers: np.ndarray


class Loader:
    """Reads the samples of any step; steps in order are read ahead.

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
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._ahead: tuple[int, Future[_Rows]] | None = None

    def train_batch(self, step: int) -> Batch:
        """The batch of optimizer step `step`, 0 first."""
        train = self._config.train
        if self._ahead is not None and self._ahead[0] == step:
            rows = self._ahead[1].result()
        else:
            rows = self._read_step(step)
        self._ahead = None
        if step + 1 < train.steps:
            self._ahead = (step + 1, self._reader.submit(self._read_step, step + 1))
        batch = self._on_device(rows, step)
        if train.reverse_micro_batches:
            return Batch(batch.micro_batches[::-1], batch.counted_tokens)
        return batch

    def _read_step(self, step: int) -> _Rows:
        sizes = self._config.batch_sizes
        numbers = self._own_numbers(sizes.size(step))
        places = sizes.consumed(step) + numbers
        samples = self._train.order(places)
        return self._read(self._train, samples, numbers)

    def validation_batches(self) -> Iterator[Batch]:
        """The batches of a validation; see `evaluation_batches`."""
        return self.evaluation_batches(self._valid)

    def evaluation_batches(self, split: Samples) -> Iterator[Batch]:
        """Samples from all over a split, always the same ones for a seed.

        If the split is shorter than `eval_steps` batches it is used once; rows without a sample
        have an empty mask.
        """
        train = self._config.train
        wanted = train.eval_steps * train.global_batch_size
        available = min(wanted, split.num_samples)
        for first in range(0, available, train.global_batch_size):
            numbers = self._own_numbers(train.global_batch_size)
            places = first + numbers
            exists = places < available
            order = split.order(np.where(exists, places, 0))
            samples = np.where(exists, order, -1)
            yield self._on_device(self._read(split, samples, numbers), None)

    def prompt(self, length: int) -> list[int]:
        """The first tokens of the validation samples, or of the training ones if there are none."""
        samples = self._valid if self._valid.num_samples else self._train
        tokens = samples.read(0)
        return tokens[tokens != PADDING][:length].tolist()

    def _own_numbers(self, size: int) -> np.ndarray:
        """Numbers j of this rank's samples in a global batch, int64 [micro-batches, B]."""
        rows = self._config.train.micro_batch_size
        count = size // (rows * self._dp.size)
        micro_batch, row = np.arange(count)[:, None], np.arange(rows)[None, :]
        return (micro_batch * self._dp.size + self._dp.rank) * rows + row

    def _read(self, split: Samples, samples: np.ndarray, numbers: np.ndarray) -> _Rows:
        """Samples [micro-batches, B] (-1: none) of a split.

        In place of padding stand ends of documents, which nothing is predicted to be.
        """
        length = self._config.model.seq_length
        tokens = np.zeros((*samples.shape, length + 1), np.int64)
        for place in np.ndindex(samples.shape):
            if samples[place] >= 0:
                tokens[place] = split.read(int(samples[place]))
        padding = tokens == PADDING
        tokens[padding] = self._eod
        mask = (samples[..., None] >= 0) & ~padding[..., 1:]
        if self._config.data.eod_mask_loss:
            mask = mask & (tokens[..., :-1] != self._eod)
        return _Rows(tokens, mask, numbers)

    def _on_device(self, rows: _Rows, step: int | None) -> Batch:
        """Rows as tensors on the device."""
        tokens, mask, numbers = map(self._to_device, (rows.tokens, rows.mask, rows.numbers))
        seed = self._config.train.seed
        micro_batches = tuple(
            MicroBatch(
                tokens=tokens[i, :, :-1],
                labels=tokens[i, :, 1:],
                mask=mask[i],
                place=None if step is None else DropoutPlace(seed, step, numbers[i]),
                documents=self.documents(rows.tokens[i, :, :-1]),
            )
            for i in range(len(tokens))
        )
        return Batch(micro_batches, int(rows.mask.sum()))

    def documents(self, tokens: np.ndarray) -> Documents | None:
        """Of the inputs of a micro-batch, int64 [B, S]; None if nothing depends on them."""
        data = self._config.data
        if not (data.reset_attention_mask or data.reset_position_ids):
            return None
        starts = document_starts(tokens, self._eod)
        bounds, longest = document_bounds(starts)
        return Documents(self._to_device(starts), self._to_device(bounds), longest)

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cuda":
            # From pinned memory the copy does not make the host wait.
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)
