"""The samples of a step do not depend on the data ranks and micro-batches among which they are
dealt; labels are the tokens after; masks leave out what must not count."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megalite.config import Config, resolve
from megalite.data.host_batch import Batch
from megalite.data.loader import Loader
from megalite.data.samples import PADDING, sample_order
from megalite.errors import DataError

BATCH = 16
SEQ = 6
LAYOUTS = [(dp, rows) for dp, rows in product((1, 2, 4), (1, 2, 4))]
EOD = 256


class InOrder:
    """Samples in the order of the seed."""

    def __init__(self, num_samples: int, seed: int = 1234):
        self.num_samples, self.seed = num_samples, seed

    def order(self, places: np.ndarray) -> np.ndarray:
        return sample_order(places, self.num_samples, self.seed)


class Numbered(InOrder):
    """Sample i is i * 1000 + 0, 1, 2, ...: it can be recognised by any of its tokens."""

    def __init__(self, num_samples: int, seed: int = 1234):
        super().__init__(num_samples, seed)
        self.reads: list[int] = []

    def read(self, index: int) -> np.ndarray:
        assert index >= 0
        self.reads.append(index)
        return index * 1000 + np.arange(SEQ + 1)


class WithEnds(InOrder):
    """Sample i holds an end of document at i % (SEQ + 1)."""

    def read(self, index: int) -> np.ndarray:
        tokens = np.arange(SEQ + 1) + 10
        tokens[index % (SEQ + 1)] = EOD
        return tokens


def settings(dp: int = 1, rows: int = 1, **values: object) -> Config:
    return resolve(
        Config().replace(
            **{
                **dict(dp=dp, micro_batch_size=rows, global_batch_size=BATCH),
                **dict(seq_length=SEQ, steps=9),
                **values,
            }
        )
    )


def loaders(
    dp: int, rows: int, train: object = None, valid: object = None, **values: object
) -> Iterator[Loader]:
    """One for each data rank."""
    for rank in range(dp):
        yield Loader(
            settings(dp, rows, **values),
            train or Numbered(1000),
            valid or Numbered(1000),
            SimpleNamespace(rank=rank, size=dp),
            torch.device("cpu"),
        )


def samples_of(batch: Batch) -> list[list[int]]:
    """Sample numbers, by micro-batch and row."""
    return [(mb.tokens[:, 0] // 1000).tolist() for mb in batch.micro_batches]


def flat(batches: list[Batch]) -> list[int]:
    return [i for batch in batches for rows in samples_of(batch) for i in rows]


# Training


@pytest.mark.parametrize(("dp", "rows"), LAYOUTS)
@pytest.mark.parametrize("step", [0, 1, 7, 1000])
def test_the_samples_of_a_step_are_the_same_in_every_layout(dp: int, rows: int, step: int) -> None:
    train = Numbered(100)  # a step may cross an epoch
    batches = [loader.train_batch(step) for loader in loaders(dp, rows, train, steps=step + 1)]
    want = sample_order(np.arange(step * BATCH, (step + 1) * BATCH), 100, 1234).tolist()
    assert sorted(flat(batches)) == sorted(want)
    assert sorted(train.reads) == sorted(want), "each is read once, by the rank that needs it"
    # Sample j of the step is in micro-batch m, rank r, row b with j = (m dp + r) rows + b.
    by_rank = [samples_of(batch) for batch in batches]
    for j, sample in enumerate(want):
        group, row = divmod(j, rows)
        micro_batch, rank = divmod(group, dp)
        assert by_rank[rank][micro_batch][row] == sample


@pytest.mark.parametrize(("dp", "rows"), LAYOUTS)
def test_micro_batches_say_which_samples_of_the_step_they_hold(dp: int, rows: int) -> None:
    """Dropout masks follow these numbers, so they must name the same sample in every layout."""
    order = sample_order(np.arange(3 * BATCH, 4 * BATCH), 1000, 77)
    numbers = []
    for loader in loaders(dp, rows, Numbered(1000, seed=77), seed=77):
        batch = loader.train_batch(3)
        assert len(batch.micro_batches) == BATCH // dp // rows
        for mb in batch.micro_batches:
            assert (mb.place.seed, mb.place.step) == (77, 3)
            assert (mb.tokens[:, 0] // 1000).tolist() == order[mb.place.samples.numpy()].tolist()
            numbers += mb.place.samples.tolist()
    assert sorted(numbers) == list(range(BATCH))


@pytest.mark.parametrize(("dp", "rows"), LAYOUTS)
def test_labels_are_the_tokens_after(dp: int, rows: int) -> None:
    for loader in loaders(dp, rows):
        batch = loader.train_batch(2)
        for mb in batch.micro_batches:
            first = mb.tokens[:, :1]
            assert (mb.tokens == first + torch.arange(SEQ)).all()
            assert (mb.labels == first + torch.arange(1, SEQ + 1)).all()
            assert mb.tokens.shape == mb.labels.shape == mb.mask.shape == (rows, SEQ)
            assert (mb.tokens.dtype, mb.labels.dtype, mb.mask.dtype) == (
                *(torch.int64, torch.int64, torch.bool),
            )
            assert mb.mask.all()
        assert batch.counted_tokens == BATCH // dp * SEQ


def test_an_epoch_reads_every_sample_once() -> None:
    (loader,) = loaders(1, 4, Numbered(64))
    first = flat([loader.train_batch(step) for step in range(4)])
    second = flat([loader.train_batch(step) for step in range(4, 8)])
    assert Counter(first) == Counter(range(64)) and Counter(second) == Counter(range(64, 128))
    assert first != [number - 64 for number in second]


def test_a_seed_gives_one_order_and_another_seed_another() -> None:
    orders = [
        [flat([loader.train_batch(step)]) for step in range(5)]
        for seed in (1, 1, 2)
        for loader in loaders(1, 4, Numbered(1000, seed), seed=seed)
    ]
    assert orders[0] == orders[1] != orders[2]


def test_micro_batches_may_run_in_reverse() -> None:
    (forwards,) = loaders(1, 4)
    (backwards,) = loaders(1, 4, reverse_micro_batches=True)
    one, other = forwards.train_batch(5), backwards.train_batch(5)
    assert samples_of(other) == samples_of(one)[::-1]
    assert len(one.micro_batches) == 4
    assert [mb.place.samples.tolist() for mb in other.micro_batches] == [
        mb.place.samples.tolist() for mb in one.micro_batches[::-1]
    ]
    assert flat(backwards.validation_batches()) == flat(forwards.validation_batches())


@pytest.mark.parametrize(("dp", "rows"), LAYOUTS)
@pytest.mark.parametrize("masked", [False, True])
def test_eod_mask_loss_leaves_out_what_follows_an_end(dp: int, rows: int, masked: bool) -> None:
    counted = 0
    for loader in loaders(dp, rows, WithEnds(100), eod_mask_loss=masked):
        batch = loader.train_batch(0)
        for mb in batch.micro_batches:
            ends = mb.tokens == EOD
            assert (mb.mask == (~ends if masked else torch.ones_like(ends))).all()
        assert batch.counted_tokens == sum(int(mb.mask.sum()) for mb in batch.micro_batches)
        counted += batch.counted_tokens
    samples = sample_order(np.arange(BATCH), 100, 1234)
    as_input = int((samples % (SEQ + 1) < SEQ).sum())  # an end in the last place is a label only
    assert 0 < as_input < BATCH
    assert counted == BATCH * SEQ - (as_input if masked else 0)


class Padded(InOrder):
    """Sample i ends with i % (SEQ + 1) places of padding, and holds no end of document."""

    def read(self, index: int) -> np.ndarray:
        tokens = np.arange(SEQ + 1) + 10
        tokens[SEQ + 1 - index % (SEQ + 1) :] = PADDING
        return tokens


@pytest.mark.parametrize(("dp", "rows"), LAYOUTS)
def test_no_label_is_padding(dp: int, rows: int) -> None:
    """Nor is anything but the labels left out: the last token before it is a label."""
    counted = 0
    for loader in loaders(dp, rows, Padded(100), Padded(100), eval_steps=1):
        for batch in (loader.train_batch(0), *loader.validation_batches()):
            for mb in batch.micro_batches:
                assert ((mb.tokens >= 10) & (mb.labels >= 10)).all()
                assert (mb.mask == (mb.labels != EOD)).all(), "an end stands in its place"
                assert (mb.tokens[:, 1:] == mb.labels[:, :-1]).all()
            counted += batch.counted_tokens
    samples = sample_order(np.arange(BATCH), 100, 1234)
    assert counted == 2 * int(np.maximum(SEQ - samples % (SEQ + 1), 0).sum())


# Validation


@pytest.mark.parametrize(("dp", "rows"), LAYOUTS)
@pytest.mark.parametrize("available", [1, 5, 16, 17, 40, 48, 1000])
def test_validation_uses_each_sample_once(dp: int, rows: int, available: int) -> None:
    """Three batches of 16; if the split has fewer, all of it and rows without a sample."""
    used: list[int] = []
    counted = 0
    for loader in loaders(dp, rows, valid=Numbered(available), eval_steps=3):
        batches = list(loader.validation_batches())
        assert len(batches) == min(3, -(-available // BATCH)), "all ranks run as many forwards"
        for batch in batches:
            assert len(batch.micro_batches) == BATCH // dp // rows
            for mb in batch.micro_batches:
                assert mb.place is None, "no dropout"
                exists = mb.mask.any(dim=1)
                assert (mb.mask == exists[:, None]).all(), "a row counts or it does not"
                assert not mb.tokens[~exists].any()
                used += (mb.tokens[exists, 0] // 1000).tolist()
            counted += batch.counted_tokens
    want = min(available, 3 * BATCH)
    assert sorted(used) == sorted(sample_order(np.arange(want), available, 1234).tolist())
    assert len(set(used)) == want
    assert counted == want * SEQ


def test_validation_is_the_same_each_time() -> None:
    (loader,) = loaders(1, 4, eval_steps=3)
    first = flat(loader.validation_batches())
    loader.train_batch(3)
    assert flat(loader.validation_batches()) == first
    assert max(first) > 500, "samples from all over the split"


def test_validation_masks_ends_of_documents_too() -> None:
    (loader,) = loaders(1, 4, valid=WithEnds(100), eod_mask_loss=True, eval_steps=2)
    batches = list(loader.validation_batches())
    masks = torch.cat([mb.mask for batch in batches for mb in batch.micro_batches])
    tokens = torch.cat([mb.tokens for batch in batches for mb in batch.micro_batches])
    assert (masks == (tokens != EOD)).all()
    assert not masks.all()


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_validation_is_as_long_as_asked(steps: int) -> None:
    (loader,) = loaders(1, 4, eval_steps=steps)
    assert len(flat(loader.validation_batches())) == steps * BATCH


# Every batch, by its definition


class Ragged(InOrder):
    """Ends of documents all over, and padding at the end of some samples."""

    def read(self, index: int) -> np.ndarray:
        draw = np.random.default_rng(index)
        tokens = draw.integers(0, EOD, SEQ + 1)
        tokens[draw.random(SEQ + 1) < 0.3] = EOD
        tokens[SEQ + 1 - int(draw.integers(0, 3)) :] = PADDING
        return tokens


Sample = tuple[list[int], list[int], list[bool], list[int], int]


def defined(samples: Ragged, place: int, number: int) -> Sample:
    """Inputs, labels, mask, positions in documents, number of the sample at a place of the run."""
    read = samples.read(int(samples.order(np.array([place]))[0])).tolist()
    mask = [label != PADDING and token != EOD for token, label in pairwise(read)]
    tokens = [EOD if token == PADDING else token for token in read]
    positions = [0]
    for token in tokens[: SEQ - 1]:
        positions.append(0 if token == EOD else positions[-1] + 1)
    return tokens[:-1], tokens[1:], mask, positions, number


def found(batch: Batch) -> list[list[Sample]]:
    """The same of the samples of a batch, by micro-batch and row."""
    return [
        [
            (tokens.tolist(), labels.tolist(), mask.tolist(), positions.tolist(), int(number))
            for tokens, labels, mask, positions, number in zip(
                *(mb.tokens, mb.labels, mb.mask),
                *(mb.documents.positions(), mb.place.samples),
                strict=True,
            )
        ]
        for mb in batch.micro_batches
    ]


@pytest.mark.parametrize(("dp", "rows"), LAYOUTS)
@pytest.mark.parametrize("reverse", [False, True])
def test_every_batch_of_a_ramp_is_as_defined(dp: int, rows: int, reverse: bool) -> None:
    """Read ahead in order, with a step twice and a step back on the way."""
    train = Ragged(50)
    start = dp * rows
    ramp = (start, BATCH - start, 2 * start) if start < BATCH else ()
    values = dict(rampup_batch_size=ramp, reset_attention_mask=True, steps=6)
    config = settings(dp, rows, **values)
    sizes = [config.batch_sizes.size(step) for step in range(6)]
    assert len(set(sizes)) == (1 if dp * rows == BATCH else 2), "the batch grows in these steps"
    for rank, loader in enumerate(
        loaders(dp, rows, train, **values, reverse_micro_batches=reverse)
    ):
        for step in (0, 1, 2, 2, 1, 2, 3, 4, 5):
            first = config.batch_sizes.consumed(step)
            want = [
                [
                    defined(train, first + j, j)
                    for j in range((m * dp + rank) * rows, (m * dp + rank + 1) * rows)
                ]
                for m in range(sizes[step] // dp // rows)
            ]
            batch = loader.train_batch(step)
            assert found(batch) == (want[::-1] if reverse else want)
            counted = sum(sum(mask) for row in want for _, _, mask, _, _ in row)
            assert batch.counted_tokens.dtype == torch.float64
            assert batch.counted_tokens == counted
            for mb in batch.micro_batches:
                tokens = mb.tokens.flatten().tolist()
                starts = [i for i in range(rows * SEQ) if not i % SEQ or tokens[i - 1] == EOD]
                bounds = [*starts, rows * SEQ]
                assert mb.documents.bounds.tolist() == bounds
                assert mb.documents.bounds.dtype == torch.int32
                assert mb.documents.longest == max(b - a for a, b in pairwise(bounds))


def test_documents_of_a_prompt_are_those_of_a_sample() -> None:
    (loader,) = loaders(1, 1, reset_position_ids=True)
    documents = loader.documents(np.array([[5, EOD, 6, 7]]))
    assert documents.starts.tolist() == [[0, 0, 2, 2]]
    assert (documents.bounds.tolist(), documents.longest) == ([0, 2, 4], 2)
    assert fresh().documents(np.array([[5, EOD]])) is None


# Reading ahead

PATIENCE_S = 60
"""Nothing here takes so long, unless it hangs."""


class Watched(Numbered):
    """Knows which thread reads; one sample cannot be read."""

    def __init__(self, broken: int = -1) -> None:
        super().__init__(1000)
        self.broken = broken
        self.threads: set[threading.Thread] = set()

    def read(self, index: int) -> np.ndarray:
        self.threads.add(threading.current_thread())
        if index == self.broken:
            raise DataError("the disk is gone")
        return super().read(index)


class Slow(Watched):
    """Reads nothing beyond the first `free` samples until `go`; says that it was asked to."""

    def __init__(self, free: int) -> None:
        super().__init__()
        self.free = free
        self.asked, self.go = threading.Event(), threading.Event()

    def read(self, index: int) -> np.ndarray:
        if len(self.reads) >= self.free:
            self.asked.set()
            assert self.go.wait(PATIENCE_S), "the thread that trains waits for this read"
        return super().read(index)


def test_the_next_step_is_read_while_this_one_runs() -> None:
    samples = Slow(free=BATCH)
    (loader,) = loaders(1, 4, samples)
    assert flat([loader.train_batch(0)]) == flat_of(0)
    # Here a step would run, and step 1 is being read.
    assert samples.asked.wait(PATIENCE_S)
    assert len(samples.reads) == BATCH
    samples.go.set()
    assert flat([loader.train_batch(1)]) == flat_of(1)
    assert len(samples.threads) == 1 and threading.current_thread() not in samples.threads


def test_the_next_batch_of_a_validation_is_read_while_this_one_runs() -> None:
    samples = Slow(free=BATCH)
    (loader,) = loaders(1, 4, valid=samples, eval_steps=3)
    batches = loader.validation_batches()
    first = next(batches)
    assert samples.asked.wait(PATIENCE_S)
    assert len(samples.reads) == BATCH
    samples.go.set()
    want = sample_order(np.arange(3 * BATCH), 1000, 1234).tolist()
    assert flat([first, *batches]) == want
    assert samples.reads == want, "each is read once, in order"
    assert len(samples.threads) == 1 and threading.current_thread() not in samples.threads


def test_a_validation_between_two_steps_changes_neither() -> None:
    (loader,) = loaders(1, 4, eval_steps=3)
    steps = []
    for step in range(4):
        steps.append(flat([loader.train_batch(step)]))
        validation = loader.validation_batches()
        next(validation)  # and the rest of it is never asked for
    assert steps == [flat_of(step) for step in range(4)]


def test_steps_come_in_any_order() -> None:
    samples = Watched()
    (loader,) = loaders(1, 4, samples)
    loader.train_batch(8)  # the last
    assert sorted(samples.reads) == sorted(flat_of(8))
    with_gaps = [samples_of(loader.train_batch(step)) for step in (3, 4, 2, 2)]
    assert with_gaps == [samples_of(fresh().train_batch(step)) for step in (3, 4, 2, 2)]


def fresh() -> Loader:
    return next(loaders(1, 4))


def flat_of(step: int) -> list[int]:
    return flat([fresh().train_batch(step)])


def test_nothing_is_read_beyond_the_last_step() -> None:
    samples = Watched()
    (loader,) = loaders(1, 4, samples)
    for step in range(9):
        loader.train_batch(step)
    (thread,) = samples.threads
    del loader
    thread.join(PATIENCE_S)
    assert len(samples.reads) == 9 * BATCH


def test_what_cannot_be_read_is_told_at_its_own_step() -> None:
    broken = flat_of(2)[5]
    assert broken not in flat_of(0) + flat_of(1)
    (loader,) = loaders(1, 4, Watched(broken))
    loader.train_batch(0)
    loader.train_batch(1)
    with pytest.raises(DataError, match="the disk is gone"):
        loader.train_batch(2)


def test_what_cannot_be_read_in_a_validation_is_told_at_its_own_batch() -> None:
    broken = int(sample_order(np.arange(BATCH, 2 * BATCH), 1000, 1234)[7])
    (loader,) = loaders(1, 4, valid=Watched(broken), eval_steps=3)
    batches = loader.validation_batches()
    next(batches)
    with pytest.raises(DataError, match="the disk is gone"):
        next(batches)


def test_the_thread_ends_with_the_loader() -> None:
    samples = Watched()
    (loader,) = loaders(1, 4, samples)
    loader.train_batch(0)
    (thread,) = samples.threads
    assert thread.is_alive()
    del loader
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


EXIT_WHILE_READING = """
import threading
import test_loader

reading = threading.Event()
class Slowly(test_loader.Watched):
    def read(self, index):
        if len(self.reads) >= test_loader.BATCH:
            reading.set()
        return super().read(index)
(loader,) = test_loader.loaders(1, 4, Slowly())
loader.train_batch(0)
assert reading.wait(60)
"""


def test_a_program_ends_while_a_batch_is_read() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", EXIT_WHILE_READING],
        cwd=Path(__file__).parent,
        timeout=PATIENCE_S,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
