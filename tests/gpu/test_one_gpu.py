"""One GPU: the same initial weights and dropout as a CPU, the same training, and nothing waits."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megalite.config import Config, resolve
from megalite.data.host_batch import Batch, StackedBatch
from megalite.data.loader import Loader
from megalite.data.mixture import prepare_mixture
from megalite.data.splits import open_samples
from megalite.layers.batch import DropoutPlace
from megalite.layers.dropout import attention_keep, hidden_dropout
from megalite.layers.sdpa import fastest_attention
from megalite.metrics import DelayedScalars
from megalite.parallel.groups import ParallelGroups
from megalite.parallel.rng import normal_slice
from megalite.trainer import Trainer

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def make_trainer(device: torch.device, **values: object) -> Trainer:
    small = dict(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        num_kv_heads=2,
        ffn_hidden_size=96,
        seq_length=32,
        micro_batch_size=2,
        global_batch_size=8,
        steps=20,
        lr=1e-3,
        precision="fp32",
        device=device.type,
    )
    config = resolve(Config().replace(**{**small, **values}))
    samples = open_samples(config, prepare_mixture(config.data))
    return Trainer(config, samples, ParallelGroups.solo(), device)


def train(trainer: Trainer, steps: int) -> list[float]:
    return [trainer.train_step(step)[1].item() for step in range(steps)]


def worst(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))


def test_random_values_are_the_cpu_s_bit_for_bit() -> None:
    rows, columns = range(3, 1500), range(10, 700)
    on_cpu = normal_slice(99, (2000, 1000), rows, columns, CPU)
    on_gpu = normal_slice(99, (2000, 1000), rows, columns, CUDA)
    assert torch.equal(on_gpu.cpu(), on_cpu)


def test_dropout_masks_are_the_cpu_s() -> None:
    masks = []
    for device in (CPU, CUDA):
        place = DropoutPlace(5, 7, torch.arange(3, device=device))
        x = torch.ones(16, 3, 24, device=device)
        hidden = hidden_dropout(x, 0.3, place, "site", 16)
        keep = attention_keep(0.3, place, "site", range(2, 4), 8, 16)
        masks.append((hidden.cpu(), keep.cpu()))
    assert torch.equal(masks[0][0], masks[1][0])
    assert torch.equal(masks[0][1], masks[1][1])


def test_training_equals_the_cpu_s() -> None:
    want, got = train(make_trainer(CPU), 20), train(make_trainer(CUDA), 20)
    assert worst(got, want) <= 1e-5
    want = train(make_trainer(CPU, precision="fp64"), 20)
    got = train(make_trainer(CUDA, precision="fp64"), 20)
    assert worst(got, want) <= 1e-11


def test_bf16_follows_fp32() -> None:
    want = train(make_trainer(CUDA), 20)
    with fastest_attention(CUDA):
        got = train(make_trainer(CUDA, precision="bf16"), 20)
    assert worst(got, want) <= 5e-3


@pytest.mark.parametrize(
    "values",
    [dict(precision="bf16", moments_dtype="bf16"), dict(precision="bf16-pure")],
    ids=str,
)
def test_states_in_bf16_follow_fp32(values: dict[str, Any]) -> None:
    want = train(make_trainer(CUDA), 20)
    with fastest_attention(CUDA):
        trainer = make_trainer(CUDA, **values)
        got = train(trainer, 20)
    assert worst(got, want) <= 1e-2
    optimizer = trainer.optimizer
    assert {x.dtype for x in (*optimizer.exp_avg, *optimizer.exp_avg_sq)} == {torch.bfloat16}
    is_pure = values["precision"] == "bf16-pure"
    assert (optimizer.master[0].dtype == torch.bfloat16) == is_pure


def test_fp16_follows_fp32_and_skips_what_overflows() -> None:
    want = train(make_trainer(CUDA), 20)
    # Gradients of the first steps, times 2^40, are beyond fp16's 65504.
    trainer = make_trainer(CUDA, precision="fp16", initial_loss_scale=2.0**40, hysteresis=1)
    with fastest_attention(CUDA):
        rows = [trainer.train_step(step).tolist() for step in range(60)]
    skipped = [not math.isfinite(norm) for norm, *_ in rows]
    assert skipped[0] and 10 < sum(skipped) < 40
    halved = [2.0 ** (40 - sum(skipped[:step])) for step in range(60)]
    assert [scale for _, _, scale, _ in rows] == halved
    assert trainer.optimizer.steps.item() == 60 - sum(skipped)
    trainer = make_trainer(CUDA, precision="fp16")
    with fastest_attention(CUDA):
        got = train(trainer, 20)
    assert worst(got, want) <= 5e-3


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_states_on_the_host_change_no_bit_and_take_no_memory(optimizer: str) -> None:
    found, taken = [], []
    for away in (False, True):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        # Several buckets: of their states two are on the GPU at a time.
        wide = dict(hidden_size=1024, ffn_hidden_size=4096, num_layers=8, precision="bf16")
        trainer = make_trainer(CUDA, optimizer=optimizer, offload_optimizer=away, **wide)
        losses = train(trainer, 8)
        trainer.optimizer.validate()
        parts = trainer.optimizer.master, trainer.optimizer.exp_avg
        found.append((losses, [trainer.flat.whole(part).cpu() for part in parts]))
        taken.append(torch.cuda.memory_allocated() - before)
        homes = [state for part in parts for state in part]
        assert all(state.is_pinned() == away and state.is_cuda != away for state in homes)
        trainer.flat.release()
        del trainer, parts, homes
    (losses, states), (losses_away, states_away) = found
    assert losses == losses_away
    assert all(map(torch.equal, states, states_away))
    assert taken[1] < 0.8 * taken[0]


def test_recompute_and_dropout_change_nothing() -> None:
    drop = dict(hidden_dropout=0.1, attention_dropout=0.1)
    plain = train(make_trainer(CUDA, **drop), 5)
    for recompute in ("selective", "full"):
        assert worst(train(make_trainer(CUDA, recompute=recompute, **drop), 5), plain) <= 1e-6


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize(
    "values",
    [
        dict(),
        dict(precision="bf16-pure"),
        dict(skip_spikes=6.0, spike_window=2, lr_scale=("*.q_proj.*=2",), freeze=("*.0.mlp.*",)),
    ],
    ids=str,
)
def test_nothing_waits_for_the_gpu_in_a_step(values: dict[str, Any]) -> None:
    trainer = make_trainer(CUDA, **{"precision": "bf16", **values})
    scalars = DelayedScalars(CUDA)
    trainer.train_step(0)  # allocations and handles of the first step may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        statistics = trainer.train_step(1)
        scalars.begin()
        scalars.push(statistics)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    reading = scalars.flush()
    assert reading is not None
    assert reading.values == statistics.tolist()


# The way of batches to the device


class Ended:
    """Random samples in which documents end."""

    num_samples = 1 << 20

    def order(self, places: np.ndarray) -> np.ndarray:
        return places

    def read(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(250, 257, 128 + 1)


def make_loader(device: torch.device, **values: object) -> Loader:
    config = resolve(
        Config().replace(
            **{
                **dict(seq_length=128, micro_batch_size=2, global_batch_size=8, steps=40),
                **dict(reset_attention_mask=True, device=device.type),
                **values,
            }
        )
    )
    return Loader(config, Ended(), Ended(), ParallelGroups.solo().dp, device)


def tensors(batch: Batch) -> list[Tensor]:
    """All that a batch holds."""
    found = [batch.counted_tokens]
    for mb in batch.micro_batches:
        assert mb.documents is not None
        found += [mb.tokens, mb.labels, mb.mask, mb.documents.starts, mb.documents.bounds]
        found += [] if mb.place is None else [mb.place.samples]
    return found


def longest(batch: Batch) -> list[int]:
    return [mb.documents.longest for mb in batch.micro_batches if mb.documents is not None]


def note_pinning(patch: pytest.MonkeyPatch) -> list[tuple[threading.Thread, int]]:
    """The thread that asks for pinned memory, and its current GPU, at each call from now on."""
    found: list[tuple[threading.Thread, int]] = []

    def note() -> None:
        found.append((threading.current_thread(), torch.cuda.current_device()))

    def noted(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noting(*args: Any, **kwargs: Any) -> Tensor:
            if kwargs.get("pin_memory"):
                note()
            return make(*args, **kwargs)

        return noting

    for name in ("empty", "empty_like", "zeros", "zeros_like", "full", "tensor"):
        patch.setattr(torch, name, noted(getattr(torch, name)))
    pin = Tensor.pin_memory

    def pinning(self: Tensor, *args: Any) -> Tensor:
        note()
        return pin(self, *args)

    patch.setattr(Tensor, "pin_memory", pinning)
    return found


def note_copies(patch: pytest.MonkeyPatch) -> list[bool]:
    """Whether its source is pinned, of each tensor that batches copy to the device from now on."""
    found: list[bool] = []
    right = StackedBatch.on

    def noting(self: StackedBatch, device: torch.device) -> StackedBatch:
        def note(tensor: Tensor) -> Tensor:
            found.append(tensor.is_pinned())
            return tensor

        return right(self.each(note), device)

    patch.setattr(StackedBatch, "on", noting)
    return found


def test_the_reader_s_thread_pins_and_the_main_thread_only_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = make_trainer(CUDA, reset_attention_mask=True, eval_steps=3)
    pinned, copied = note_pinning(monkeypatch), note_copies(monkeypatch)
    kinds = len(fields(StackedBatch)) + 1  # documents are two tensors
    for step in range(4):
        trainer.train_step(step)
    assert copied == [True] * 4 * kinds, "one copy of a kind, for all four micro-batches"
    trainer.validate()
    assert copied == [True] * 7 * kinds
    assert len(pinned) >= len(copied)
    (thread,) = {thread for thread, _ in pinned}
    assert thread.name.startswith("reader") and thread is not threading.current_thread()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_reader_s_thread_is_on_the_gpu_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = note_pinning(monkeypatch)
    batch = make_loader(torch.device("cuda", 1)).train_batch(0)
    assert {tensor.device.index for tensor in tensors(batch)} == {1}
    assert {gpu for _, gpu in pinned} == {1}
    assert torch.cuda.current_device() == 0, "of the thread that trains"


def test_batches_are_the_cpu_s_however_late_the_gpu_copies_them() -> None:
    """The reader goes on while copies wait behind a kernel: memory that is used again before its
    copy has run would hold the values of a later step."""
    steps, late = 40, 0
    ours, theirs = make_loader(CUDA), make_loader(CPU)
    batches = []
    for step in range(steps):
        torch.cuda._sleep(50_000_000)  # clock cycles: tens of milliseconds
        batches.append(ours.train_batch(step))
        copied = torch.cuda.Event()
        copied.record()
        late += not copied.query()
    assert late > steps / 2, "the GPU was not behind"
    torch.cuda.synchronize()
    seen = set()
    for step, got in enumerate(batches):
        want = theirs.train_batch(step)
        seen.add(tuple(want.micro_batches[0].tokens.flatten().tolist()))
        assert longest(got) == longest(want)
        for one, other in zip(tensors(got), tensors(want), strict=True):
            assert one.device == CUDA and one.dtype == other.dtype
            assert torch.equal(one.cpu(), other), f"step {step}"
    assert len(seen) == steps, "no step would pass for another"
