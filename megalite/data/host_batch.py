"""A batch in the host's memory, and its way to the device.

The reader's thread does all that takes time: it reads the samples, finds out what follows from
their tokens, and pins the memory. The thread that trains starts one copy for each kind of value,
whatever the number of micro-batches, and cuts the result into micro-batches, which copies nothing.

Legend: M micro-batches, B samples of each, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megalite.config import Config
from megalite.data.documents import document_bounds, document_starts
from megalite.data.samples import PADDING, Samples
from megalite.layers.batch import Documents, DropoutPlace, MicroBatch
from megalite.tokenizer.choose import open_tokenizer


@dataclass(frozen=True)
class Batch:
    """One data rank's part of a global batch, on the device.

    Attributes:
        micro_batches: in the order in which they run.
        counted_tokens: fp64 [], True places of all their masks.
    """

    micro_batches: tuple[MicroBatch, ...]
    counted_tokens: Tensor


@dataclass(frozen=True)
class StackedDocuments:
    """The documents of all micro-batches.

    Attributes:
        starts: int64 [M, B, S], as of `Documents`.
        bounds: int32, those of each micro-batch behind those of the one before.
        sizes: how many of the bounds are of each micro-batch.
        longest: of each micro-batch [tokens].
    """

    starts: Tensor
    bounds: Tensor
    sizes: tuple[int, ...]
    longest: tuple[int, ...]

    def each(self, change: Callable[[Tensor], Tensor]) -> StackedDocuments:
        """The same with every tensor changed."""
        return StackedDocuments(change(self.starts), change(self.bounds), self.sizes, self.longest)

    def split(self) -> list[Documents]:
        """Of each micro-batch, as views."""
        bounds = self.bounds.split(self.sizes)
        return [Documents(*each) for each in zip(self.starts, bounds, self.longest, strict=True)]


@dataclass(frozen=True)
class StackedBatch:
    """One data rank's part of a global batch, one tensor for each kind of value.

    Attributes:
        tokens: int64 [M, B, S + 1].
        mask: bool [M, B, S].
        numbers: int64 [M, B], of the samples in the global batch.
        counted_tokens: fp64 [], True places of the mask.
        documents: None if nothing depends on them.
    """

    tokens: Tensor
    mask: Tensor
    numbers: Tensor
    counted_tokens: Tensor
    documents: StackedDocuments | None

    def each(self, change: Callable[[Tensor], Tensor]) -> StackedBatch:
        """The same with every tensor changed."""
        return StackedBatch(
            change(self.tokens),
            change(self.mask),
            change(self.numbers),
            change(self.counted_tokens),
            None if self.documents is None else self.documents.each(change),
        )

    def on(self, device: torch.device) -> StackedBatch:
        """The same on a device; on a GPU the copies are only started.

        They may run after this batch is dropped. Its pinned memory is of torch's caching host
        allocator, and that is relied on: it notes the stream of each `non_blocking` copy of a
        tensor of its own, records an event there when the tensor is dropped, and gives the memory
        to nobody before the event has passed. So nobody may write into a pinned batch, nor copy
        from it by other means.
        """
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, seed: int, step: int | None) -> Batch:
        """Cut into micro-batches, as views.

        Args:
            seed: of the run.
            step: of the run, for dropout; None in evaluation.
        """
        count = len(self.tokens)
        documents = [None] * count if self.documents is None else self.documents.split()
        micro_batches = tuple(
            MicroBatch(
                tokens=self.tokens[i, :, :-1],
                labels=self.tokens[i, :, 1:],
                mask=self.mask[i],
                place=None if step is None else DropoutPlace(seed, step, self.numbers[i]),
                documents=documents[i],
            )
            for i in range(count)
        )
        return Batch(micro_batches, self.counted_tokens)


class BatchReader:
    """Reads samples into the host's memory.

    Args:
        config: the run.
        device: where the batches will go, a GPU with its number.
    """

    def __init__(self, config: Config, device: torch.device):
        self._data, self._length, self._device = config.data, config.model.seq_length, device
        self._eod = open_tokenizer(config.data, config.model.vocab_size).eod

    def read(self, split: Samples, samples: np.ndarray, numbers: np.ndarray) -> StackedBatch:
        """A batch, pinned if it will go to a GPU.

        In place of padding stand ends of documents, which nothing is predicted to be.

        Args:
            split: where the samples are.
            samples: int64 [M, B], of `Samples.order`; -1: none, a row of zeros that do not count.
            numbers: int64 [M, B], of the samples in the global batch.
        """
        tokens = np.zeros((*samples.shape, self._length + 1), np.int64)
        for place in np.ndindex(samples.shape):
            if samples[place] >= 0:
                tokens[place] = split.read(int(samples[place]))
        padding = tokens == PADDING
        tokens[padding] = self._eod
        mask = (samples[..., None] >= 0) & ~padding[..., 1:]
        if self._data.eod_mask_loss:
            mask &= tokens[..., :-1] != self._eod
        return self._pinned(
            StackedBatch(
                tokens=torch.from_numpy(tokens),
                mask=torch.from_numpy(mask),
                numbers=torch.from_numpy(numbers),
                counted_tokens=torch.tensor(mask.sum(), dtype=torch.float64),
                documents=self.documents(tokens[..., :-1]),
            )
        )

    def documents(self, tokens: np.ndarray) -> StackedDocuments | None:
        """Of the inputs of micro-batches, int64 [M, B, S]; None if nothing depends on them."""
        if not (self._data.reset_attention_mask or self._data.reset_position_ids):
            return None
        starts = document_starts(tokens, self._eod)
        bounds, longest = zip(*map(document_bounds, starts), strict=True)
        return StackedDocuments(
            starts=torch.from_numpy(starts),
            bounds=torch.from_numpy(np.concatenate(bounds)),
            sizes=tuple(map(len, bounds)),
            longest=longest,
        )

    def _pinned(self, batch: StackedBatch) -> StackedBatch:
        if self._device.type != "cuda":
            return batch
        # Each thread has a current device of its own, at first GPU 0: whatever asks CUDA for
        # memory there would put a context of this process on the GPU of another rank.
        torch.cuda.set_device(self._device)
        return batch.each(_pinned_copy)


def _pinned_copy(tensor: Tensor) -> Tensor:
    """The same in pinned memory of torch's caching host allocator."""
    pinned = torch.empty_like(tensor, pin_memory=True)
    # By numpy, in this thread alone: torch would start a team of threads beside those of the
    # thread that trains.
    np.copyto(pinned.numpy(), tensor.numpy())
    return pinned
